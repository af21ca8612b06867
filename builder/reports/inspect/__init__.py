"""Reports of what is in a checkpoint: made, and told to people and to programs."""

from builder.reports.inspect.examine import Part, Report, Share, build_report, examine
from builder.reports.inspect.inspect_json import Refused, to_json
from builder.reports.inspect.inspect_text import render, types_of

__all__ = ["Part", "Refused", "Report", "Share", "build_report", "examine", "render", "to_json", "types_of"]

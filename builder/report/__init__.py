"""Reports of what is in a checkpoint: made, and told to people and to programs."""

from builder.report.json_form import Refused, to_json
from builder.report.model import Part, Report, Share, build_report, examine
from builder.report.text import render

__all__ = ["Part", "Refused", "Report", "Share", "build_report", "examine", "render", "to_json"]

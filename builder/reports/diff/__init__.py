"""What tells two checkpoints apart: found, explained, and told to people and to programs."""

from builder.reports.diff.blocks import BlockChange, by_block
from builder.reports.diff.causes import causes
from builder.reports.diff.compare import Diff, compare
from builder.reports.diff.diff_json import to_json
from builder.reports.diff.diff_text import render

__all__ = ["BlockChange", "Diff", "by_block", "causes", "compare", "render", "to_json"]

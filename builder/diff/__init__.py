"""What tells two checkpoints apart: found, explained, and told to people and to programs."""

from builder.diff.causes import causes
from builder.diff.json_form import to_json
from builder.diff.model import Diff, compare
from builder.diff.text import render

__all__ = ["Diff", "causes", "compare", "render", "to_json"]

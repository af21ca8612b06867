"""The merge that made a component, estimated from the weights alone."""

from builder.reports.new.unmerge.origin import BASE, Origin, Share
from builder.reports.new.unmerge.parents import MOST_PARENTS
from builder.reports.new.unmerge.search import find

__all__ = ["BASE", "MOST_PARENTS", "Origin", "Share", "find"]

"""The metric of components, each measured once and then remembered by its content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from builder.models.catalog import Scale
from builder.models.metric import Metric, digits, is_digits, weigh
from builder.store import Store
from builder.store.records import texts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def known_digits(store: Store, cls: str, digest: str) -> str | None:
    """The digits of a component of this content (BLAKE3), if they were measured before."""
    found = (store.recall("metric", digest, texts) or {}).get(cls)
    return found if found is not None and is_digits(found) else None


def measured(store: Store, cls: str, digest: str, histogram: NDArray[np.int64], scale: Scale) -> str:
    """The digits that a histogram gives, which are remembered."""
    found = digits(weigh(histogram), scale)
    store.note("metric", digest, {**(store.recall("metric", digest, texts) or {}), cls: found})
    return found


def metric_text(by_class: Mapping[str, str], scales: Mapping[str, Scale]) -> str:
    """The metric of digits by class, of two that are the same part the first; empty for none."""
    known: dict[str, str] = {}
    for cls, found in by_class.items():
        known.setdefault(scales[cls].part, found)
    metric = Metric(**known)
    return metric.text if metric != Metric() else ""

"""The metric of stored components, each measured once and then remembered by its content."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from builder.build.context import Context
from builder.build.evaluate import Stoppable
from builder.models.metric import Metric, measure
from builder.store import Made

_THREADS = 2  # a component; several are measured at once, and each thread has buffers of its own


class Metrics:
    """The digits of components; whoever asks while they are measured waits for them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._known: dict[tuple[str, str], str] = {}
        self._turns: dict[tuple[str, str], threading.Lock] = {}
        self._guard = threading.Lock()

    def text(self, parts: Mapping[str, Made]) -> str:
        """The metric of components by class, of two that are the same part the first; empty for none.

        Raises DamagedEntry when one is not in the store as it was put there.
        """
        known: dict[str, str] = {}
        scales = self._context.catalog.scales
        for cls, made in parts.items():
            if cls in scales and scales[cls].part not in known:
                known[scales[cls].part] = self.digits(cls, made)
        metric = Metric(**known)
        return metric.text if metric != Metric() else ""

    def digits(self, cls: str, made: Made) -> str:
        """The digits of a component of a class that has a scale; raises as `text`."""
        key = cls, made.digest.xxh3
        with self._guard:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            if key not in self._known:
                self._known[key] = self._recalled(cls, made)
            return self._known[key]

    def _recalled(self, cls: str, made: Made) -> str:
        store = self._context.store
        fact = store.recall("metric", made.digest.xxh3) or {}
        if cls not in fact:
            fact = {cls: self._measured(cls, made)}
            store.note("metric", made.digest.xxh3, fact)
        return str(fact[cls])

    def _measured(self, cls: str, made: Made) -> str:
        context = self._context
        checkpoint = context.store.open(made, verify=False)
        if checkpoint is None:
            raise context.store.gone(made)
        with checkpoint:
            found = measure(
                {cls: {n: Stoppable(t, context.stop) for n, t in checkpoint.items()}},
                context.catalog.scales,
                threads=min(context.threads, _THREADS),
                reporter=context.reporter,
                task=f"metric of {cls}",
            )
        return str(getattr(found, context.catalog.scales[cls].part))

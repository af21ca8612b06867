"""The store: what was made before, and where it lies."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from builder import store
from builder.base.errors import Problem
from builder.store import upkeep
from ckpt_build.listening import Listener, OnProgress
from ckpt_build.results import Collected, Item


@dataclass(frozen=True)
class Store:
    """A folder in which components are known by their content; processes and threads may share it.

    All of it can be deleted at any time: that costs time, never correctness.
    """

    path: Path

    def items(self) -> tuple[Item, ...]:
        """What it keeps, the least recently used first."""
        with store.Store(self.path) as opened:
            return tuple(map(_item, upkeep.items(opened)))

    def gc(self, max_size: int | None = None) -> Collected:
        """Remove litter and, with `max_size` in bytes, what was not used for longest until no more is kept.

        A build that runs meanwhile makes again what is gone. Raises OutputError when it cannot be written to.
        """
        with store.Store(self.path) as opened:
            done = upkeep.collect(opened, max_size)
        freed = done.litter + sum(i.size for i in done.removed)
        return Collected(tuple(map(_item, done.removed)), tuple(map(_item, done.kept)), freed)

    def check(
        self, *, progress: OnProgress | None = None, cancel: threading.Event | None = None
    ) -> tuple[Problem, ...]:
        """Read all of it, and set aside what is damaged: a problem for each. Empty: all is sound."""
        listener = Listener(progress, cancel)
        with listener.during(), store.Store(self.path, reporter=listener) as opened:
            threads = min(4, os.cpu_count() or 1)
            return tuple(upkeep.check(opened, threads=threads, reporter=listener))


def _item(item: upkeep.Item) -> Item:
    return Item(
        item.kind,
        item.digest,
        item.size,
        item.used,
        item.component,
        item.cls,
        item.source,
        tuple(map(Path, item.places)),
    )

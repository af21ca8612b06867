"""One engine for all passes over data: windows made by a few threads, and seen in order while warm."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

from builder.base.errors import CkptError, Problem
from builder.base.signals import go_on

Produce = Callable[[int, memoryview], int]
Consume = Callable[[int, memoryview], object]


class Cancelled(CkptError):
    """Other work has failed, or the user has stopped it: this is not the failure to tell of."""

    def __init__(self) -> None:
        super().__init__(Problem("the work was stopped"))


def run_windows(
    count: int,
    produce: Produce,
    consumers: Sequence[Consume] = (),
    *,
    size: int,
    threads: int,
    buffers: int | None = None,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    stop: threading.Event | None = None,
) -> None:
    """Make `count` numbered windows in `threads` threads, and show each to every consumer, in order.

    `produce(index, buffer)` fills a buffer of `size` bytes, does with it what needs no order (such as
    writing it to its place), and gives the number of bytes that count. Each of `consumers` has a thread of
    its own and sees all windows from first to last, each as soon as it and all before it are there.
    Windows are handed out in order and at most `buffers` of them exist at once (by default twice the
    threads and two), made once: touching fresh memory costs as much as reading into it. `around` is entered
    once by each producing thread.

    No thread is left at the end, however it comes. Raises the failure of the first window that failed:
    since all before it were handed out before, it is the same one every time. Once `stop` is set no further
    window is begun, and Cancelled is raised.
    """
    go_on()
    if count:
        _Run(count, produce, consumers, size, threads, buffers, around, stop).run()


class _Run:
    def __init__(
        self,
        count: int,
        produce: Produce,
        consumers: Sequence[Consume],
        size: int,
        threads: int,
        buffers: int | None,
        around: Callable[[], AbstractContextManager[object]],
        stop: threading.Event | None,
    ) -> None:
        self.count, self.produce, self.consumers = count, produce, consumers
        self.size, self.around, self.stop = size, around, stop
        threads = max(1, min(threads, count))
        self.unmade = max(1, buffers if buffers is not None else 2 * threads + 2)
        self.free: list[memoryview] = []
        self.made: dict[int, tuple[memoryview, memoryview]] = {}  # buffer, and what of it counts
        self.waiting: dict[int, int] = {}  # consumers that have not seen a window yet
        self.failed: dict[int, BaseException] = {}
        self.next = 0
        self.broken = False
        self.changed = threading.Condition()
        self.threads = [
            *(threading.Thread(target=self._producer, name=f"window-{n}") for n in range(threads)),
            *(threading.Thread(target=self._consumer, args=(c,), name="in-order") for c in consumers),
        ]

    def run(self) -> None:
        started: list[threading.Thread] = []
        try:
            for thread in self.threads:
                thread.start()
                started.append(thread)
            for thread in started:
                thread.join()
        except BaseException:
            self._break()
            raise
        finally:
            for thread in started:
                _join(thread)
        if self.failed:
            raise self.failed[min(self.failed)]

    def _producer(self) -> None:
        index = self.next
        try:
            with self.around():
                while (task := self._take()) is not None:
                    index, buffer = task
                    if self.stop is not None and self.stop.is_set():
                        raise Cancelled
                    used = self.produce(index, buffer)
                    self._hand_over(index, buffer, used)
        except BaseException as error:
            self._break(index, error)

    def _take(self) -> tuple[int, memoryview] | None:
        with self.changed:
            self.changed.wait_for(lambda: self.broken or self.next == self.count or self.free or self.unmade)
            if self.broken or self.next == self.count:
                return None
            index = self.next
            self.next += 1
            if self.free:
                return index, self.free.pop()
            self.unmade -= 1
        return index, memoryview(bytearray(self.size))

    def _hand_over(self, index: int, buffer: memoryview, used: int) -> None:
        with self.changed:
            if self.consumers:
                self.made[index] = buffer, buffer[:used]
                self.waiting[index] = len(self.consumers)
            else:
                self.free.append(buffer)
            self.changed.notify_all()

    def _consumer(self, consume: Consume) -> None:
        for index in range(self.count):
            with self.changed:
                self.changed.wait_for(lambda: self.broken or index in self.made)  # noqa: B023
                if index not in self.made:
                    return
                buffer, window = self.made[index]
            try:
                consume(index, window)
            except BaseException as error:
                self._break(index, error)
                return
            with self.changed:
                self.waiting[index] -= 1
                if not self.waiting[index]:
                    del self.waiting[index], self.made[index]
                    self.free.append(buffer)
                    self.changed.notify_all()

    def _break(self, index: int | None = None, error: BaseException | None = None) -> None:
        """End all work, for the failure of a window or an interruption."""
        with self.changed:
            if index is not None and error is not None:
                self.failed.setdefault(index, error)
            self.broken = True
            self.changed.notify_all()


def _join(thread: threading.Thread) -> None:
    """Wait for a thread through any interruption: it writes to a descriptor that is closed next."""
    while thread.is_alive():
        with suppress(KeyboardInterrupt):
            thread.join()

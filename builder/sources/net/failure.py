"""Why one attempt at one address came to nothing."""

from __future__ import annotations

from builder.base.errors import shown


class Failure(Exception):
    """One address, or one request, did not give what was wanted.

    `retry`: asking again may help, after `wait` seconds where the host said so. `mismatch`: the host
    gave something, and it is not what was pinned. Words of hosts get into messages through here, and are
    escaped here.
    """

    def __init__(
        self,
        fact: str,
        *,
        hint: str | None = None,
        retry: bool = False,
        wait: float | None = None,
        mismatch: bool = False,
        evidence: tuple[str, ...] = (),
    ) -> None:
        self.fact = shown(fact)
        super().__init__(self.fact)
        self.hint = hint
        self.retry = retry
        self.wait = wait
        self.mismatch = mismatch
        self.evidence = tuple(shown(line) for line in evidence)


class StartOver(Exception):
    """What was received so far cannot be continued: the file changed, or the host forgot about ranges."""

"""Why one attempt at one address came to nothing."""

from __future__ import annotations


class Failure(Exception):
    """One address, or one request, did not give what was wanted.

    `retry`: asking again may help, after `wait` seconds where the host said so. `mismatch`: the host
    gave something, and it is not what was pinned.
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
        super().__init__(fact)
        self.fact = fact
        self.hint = hint
        self.retry = retry
        self.wait = wait
        self.mismatch = mismatch
        self.evidence = evidence


class StartOver(Exception):
    """What was received so far cannot be continued: the file changed, or the host forgot about ranges."""

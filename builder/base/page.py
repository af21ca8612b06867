"""What a page on a terminal is made of."""

from __future__ import annotations

LABEL = 11  # columns of the labels at the left


class Style:
    """Escape codes of a terminal, or none of them. Nothing is meant by colour alone."""

    def __init__(self, color: bool) -> None:
        self._color = color

    def __call__(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color and text else text

    def strong(self, text: str) -> str:
        return self("1", text)

    def dim(self, text: str) -> str:
        return self("2", text)

    def good(self, text: str) -> str:
        return self("1;32", text)

    def bad(self, text: str) -> str:
        return self("1;31", text)

    def caution(self, text: str) -> str:
        return self("33", text)

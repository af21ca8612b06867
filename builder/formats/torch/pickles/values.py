"""What a pickle is made of, once nothing of it has been run."""

from __future__ import annotations

from dataclasses import dataclass


class Malformed(Exception):
    """What a pickle says cannot be; holds the fact."""


class Global:
    """A name that a pickle refers to, such as `torch.FloatStorage`; never imported."""

    __slots__ = ("module", "name", "qualname")

    def __init__(self, module: str, qualname: str) -> None:
        self.module = module
        self.qualname = qualname
        self.name = f"{module}.{qualname}"


class Stateful:
    """What a pickle may set attributes of; `state` is what it set, or nested pairs of all it set."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: object = None


class Object(Stateful):
    """What calling a global would have made: its name, and everything that was passed to it.

    `items` are what was appended or added, `pairs` keys and values that were set, one after the other.
    """

    __slots__ = ("args", "items", "name", "pairs")

    def __init__(self, name: str, args: tuple[object, ...] = (), items: list[object] | None = None) -> None:
        super().__init__()
        self.name = name
        self.args = args
        self.items = items
        self.pairs: list[object] | None = None


class Dict(list[object]):
    """A dict as a pickle spells it: key, value, key, value…

    Not hashed, since a key may be anything, such as tuples of tuples that take ages to hash; and a key
    that comes twice stays visible. `state` holds attributes, such as the `_metadata` of a state dict.
    """

    __slots__ = ("state",)

    def __init__(self, pairs: list[object] | tuple[object, ...] = ()) -> None:
        super().__init__(pairs)
        self.state: object = None

    def pairs(self) -> zip[tuple[object, object]]:
        """Keys with their values."""
        return zip(self[::2], self[1::2], strict=True)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A string too long to be kept; `kind` is `str` or `bytes`, `size` in bytes."""

    kind: str
    size: int

"""Calls of Python's own types whose results are known without calling them."""

from __future__ import annotations

from builder.formats.torch.pickles.machine import Builder
from builder.formats.torch.pickles.values import Dict, Global, Malformed, Object, Skipped


def _dict(args: tuple[object, ...]) -> object:
    """An OrderedDict, dict or the like, from nothing, a dict or pairs; a defaultdict's factory is first."""
    made = Dict()
    source = args[-1] if args else None
    if type(source) is Dict:
        made.extend(source)
    elif type(source) in (list, tuple):
        assert isinstance(source, (list, tuple))
        for pair in source:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise Malformed("a dict is made of what are no pairs")
            made.extend(pair)
    elif source is not None and type(source) is not Global:
        raise Malformed("a dict is made of what are no pairs")
    return made


def _items(args: tuple[object, ...]) -> list[object]:
    match args:
        case ():
            return []
        case (Object() as source,):
            return list(source.items or ())
        case ((list() | tuple()) as source,) if type(source) is not Dict:
            return list(source)
    raise Malformed("a list is made of what is none")


def _encoded(args: tuple[object, ...]) -> object:
    """`_codecs.encode(text, "latin1")` is how protocols before 3 spell bytes."""
    match args:
        case (str() as text, str() as coding) if coding.replace("-", "") in ("latin1", "iso88591"):
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                raise Malformed("bytes are spelt with characters that are none") from None
    return Object("_codecs.encode", args)


def _bytes(args: tuple[object, ...]) -> object:
    match args:
        case ():
            return b""
        case ((bytes() | Skipped()) as raw,):
            return raw
    return _encoded(args)


def _made_anew(args: tuple[object, ...]) -> object:
    """`copyreg._reconstructor(class, base, state)` is how protocols 0 and 1 spell objects."""
    match args:
        case (Global() as cls, Global() as base, state):
            if base.qualname == "dict":
                return _dict((state,))
            return Object(cls.name, () if state is None else (state,))
        case (Global() as cls, *rest):
            return Object(cls.name, tuple(rest))
    raise Malformed("an object is made of what is no class")


BUILDERS: dict[str, Builder] = {"_codecs.encode": _encoded}
for _module in ("collections", "_collections"):
    BUILDERS |= {f"{_module}.{name}": _dict for name in ("OrderedDict", "defaultdict", "Counter")}
for _module in ("builtins", "__builtin__"):
    BUILDERS |= {
        f"{_module}.dict": _dict,
        f"{_module}.list": _items,
        f"{_module}.tuple": lambda args: tuple(_items(args)),
        f"{_module}.set": lambda args: Object("builtins.set", (), _items(args)),
        f"{_module}.frozenset": lambda args: Object("builtins.frozenset", (), _items(args)),
        f"{_module}.bytes": _bytes,
        f"{_module}.bytearray": _bytes,
    }
for _module in ("copyreg", "copy_reg"):
    BUILDERS |= {f"{_module}._reconstructor": _made_anew, f"{_module}.__newobj__": _made_anew}

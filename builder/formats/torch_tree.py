"""Which tensors an unpickled value holds, and under which names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from builder.errors import Place, Problem, SourceError
from builder.formats.pickles import Dict, Global, Object, Skipped
from builder.formats.torch_values import Storage, TensorRef

# Where trainers put the state dict, each also within another; the first of equals wins.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "ema")

# What wrappers of modules put before every name.
_PREFIXES = ("module.", "_orig_mod.")

# A `model.` before every name is a wrapper's only if a full checkpoint's own first words come after it.
_FIRST_WORDS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")

# Attributes in which a module keeps its parts; its state dict's names are without them.
_MODULE_PARTS = frozenset({"_modules", "_parameters", "_buffers"})

MAX_NAMES = 64 << 20  # characters of all names together


@dataclass(slots=True)
class Found:
    """Tensors by name, descriptions of what else there is, and where the state dict was."""

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    nesting: str = ""


def gather(root: object, file: str) -> Found:
    """Every tensor of an unpickled value under a name, and all else as descriptions.

    The state dict is, of the root and the dicts at `state_dict`, `model`, `model.state_dict` and their
    like, the one with most tensors; the outermost and first of equals. Its tensors go by their keys, less
    a prefix that a wrapper put before all of them; all others by their whole path from the root. A storage
    on its own is a vector. A container that is met again is entered once, a tensor is named each time.

    Raises SourceError when two tensors have one name, or names are absurdly long.
    """
    return _Walk(file).run(root)


class _Part:
    """Something that a container holds: under a key, or as if it were the container itself."""

    __slots__ = ("attributes", "key", "keyed", "value")

    def __init__(self, key: object, value: object, keyed: bool = True, attributes: bool = False) -> None:
        self.key = key
        self.value = value
        self.keyed = keyed
        self.attributes = attributes  # of an object, so that a module's parts are known


def _parts(value: object, attributes: bool) -> Iterator[_Part]:
    if type(value) is Dict:
        for key, part in value.pairs():
            yield _Part(key, part, not (attributes and type(key) is str and key in _MODULE_PARTS))
    elif type(value) is list or type(value) is tuple:
        # Attributes and slots come as a pair, as does what was set twice.
        pair = attributes and len(value) == 2 and all(v is None or type(v) in (Dict, tuple) for v in value)
        for index, part in enumerate(value):
            yield _Part(index, part, not pair, pair)
    elif type(value) is Object:
        for index, part in enumerate(value.args):
            yield _Part(f"args.{index}", part)
        for index, part in enumerate(value.items or ()):
            yield _Part(index, part)
        pairs = value.pairs or []
        for key, part in zip(pairs[::2], pairs[1::2], strict=True):
            yield _Part(key, part)
    if isinstance(value, (Dict, Object, TensorRef)) and value.state is not None:
        yield _Part(None, value.state, False, True)


def _is_container(value: object) -> bool:
    if isinstance(value, TensorRef):
        return value.state is not None
    return type(value) in (Dict, list, tuple, Object)


def _is_tensor(value: object) -> bool:
    return isinstance(value, (TensorRef, Storage))


class _Walk:
    """Two passes over a graph that may be deep, shared and cyclic: which parts hold tensors; their names."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found = Found()
        self.budget = MAX_NAMES
        self.containers: list[object] = []  # in the order of their first visit
        self.parents: list[int] = []
        self.holds: list[bool] = []
        self.index: dict[int, int] = {}  # id -> place in the three lists

    def run(self, root: object) -> Found:
        self.survey(root)
        path, main = _state_dict(root)
        prefix = _wrapping(main)
        self.found.nesting = ".".join([*path, *prefix.split(".")[:-1]])
        self.emit(root, main, len(prefix))
        return self.found

    def survey(self, root: object) -> None:
        """Visit every container once, and learn which of them hold tensors."""
        todo = [(_Part(None, root), -1)]
        while todo:
            part, parent = todo.pop()
            value = part.value
            if _is_tensor(value) and parent >= 0:
                self.holds[parent] = True
            if not _is_container(value) or id(value) in self.index:
                continue
            here = self.index[id(value)] = len(self.containers)
            self.containers.append(value)
            self.parents.append(parent)
            self.holds.append(False)
            inside = _parts(value, part.attributes)
            todo += [(p, here) for p in inside if _is_tensor(p.value) or _is_container(p.value)][::-1]
        for here in range(len(self.containers) - 1, 0, -1):
            if self.holds[here]:
                self.holds[self.parents[here]] = True

    def emit(self, root: object, main: Dict | None, strip: int) -> None:
        """Name every tensor, and describe the outermost parts that hold none."""
        entered: set[int] = set()
        todo = [("" if _is_container(root) else "value", _Part(None, root), -1, False)]
        while todo:
            name, part, parent, quiet = todo.pop()
            value = part.value
            if isinstance(value, (TensorRef, Storage)):
                self.tensor(name, value)
                quiet = True
            if not _is_container(value):
                if not quiet:
                    self.other(name, _describe(value))
                continue
            here = self.index[id(value)]
            if here in entered or self.parents[here] != parent:
                if not quiet:
                    self.other(name, "a part of the file that is met elsewhere too")
                continue
            entered.add(here)
            if not quiet and type(value) is Object:
                self.other(name or "(the whole file)", _describe(value))
            elif not quiet and not self.holds[here] and parent >= 0:
                self.other(name, _describe(value))
            if not self.holds[here] and parent >= 0:
                continue
            # An object is described as a whole; of its inside only tensors matter.
            hush = type(value) is Object or isinstance(value, TensorRef)
            inside = []
            for p in _parts(value, part.attributes):
                if not p.keyed:
                    word = name
                elif value is main and isinstance(p.value, TensorRef):
                    word = _word(p.key)[strip:]
                else:
                    word = f"{name}.{_word(p.key)}" if name else _word(p.key)
                self.spend(word)
                inside.append((word, p, here, hush or not p.keyed or (quiet and part.attributes)))
            todo += reversed(inside)

    def spend(self, name: str) -> None:
        self.budget -= len(name)
        if self.budget < 0:
            raise SourceError(
                Problem(
                    "the file's tensors lie too deep within each other to be named",
                    Place(self.file),
                    (f"their names have more than {MAX_NAMES:,} characters",),
                )
            )

    def tensor(self, name: str, value: TensorRef | Storage) -> None:
        if name in self.found.tensors:
            raise SourceError(
                Problem(
                    f"two tensors of the file are named `{name}`",
                    Place(self.file),
                    hint="the file was made to mislead, or by a broken program; get the model elsewhere",
                )
            )
        self.found.tensors[name] = value if isinstance(value, TensorRef) else TensorRef.whole(value)

    def other(self, name: str, text: str) -> None:
        known = self.found.others.get(name)
        self.found.others[name] = text if known is None else f"{known}; {text}"


def _state_dict(root: object) -> tuple[tuple[str, ...], Dict | None]:
    """The path and the value of the dict that names the tensors."""
    if type(root) is not Dict:
        return (), None
    outer = _wrapped((), root)
    candidates = [((), root), *outer, *(inner for path, part in outer for inner in _wrapped(path, part))]
    counts: dict[int, int] = {}
    for _, part in candidates:
        if id(part) not in counts:
            counts[id(part)] = sum(isinstance(v, TensorRef) for _, v in part.pairs())
    best = max(candidates, key=lambda c: counts[id(c[1])])
    return best if counts[id(best[1])] else ((), None)


def _wrapped(path: tuple[str, ...], value: Dict) -> list[tuple[tuple[str, ...], Dict]]:
    parts = {k: v for k, v in value.pairs() if type(k) is str and k in _WRAPPERS and type(v) is Dict}
    return [((*path, word), parts[word]) for word in _WRAPPERS if word in parts]


def _wrapping(main: Dict | None) -> str:
    """What stands before the name of every tensor because of a wrapper around the module."""
    names = [k for k, v in main.pairs() if isinstance(v, TensorRef) and type(k) is str] if main else []
    if not names or sum(map(len, names)) > MAX_NAMES:
        return ""
    assert main is not None
    if len(names) != sum(isinstance(v, TensorRef) for _, v in main.pairs()):
        return ""
    prefix = ""
    while len(prefix) < 100:
        word = names[0].removeprefix(prefix).partition(".")[0] + "."
        longer = prefix + word
        if not all(n.startswith(longer) and len(n) > len(longer) for n in names):
            break
        inside = tuple(longer + first for first in _FIRST_WORDS)
        if word not in _PREFIXES and not (word == "model." and any(n.startswith(inside) for n in names)):
            break
        prefix = longer
    return prefix


def _word(key: object) -> str:
    """A key as a part of a name."""
    if type(key) is str:
        return key
    if key is None or type(key) in (bool, int, float):
        return str(key)
    return key.decode("utf-8", "backslashreplace") if type(key) is bytes else _describe(key)


def _describe(value: object) -> str:
    """What a value is, in a few words."""
    match value:
        case None:
            return "None"
        case bool() | int() | float():
            return f"{type(value).__name__} {value}"
        case str():
            return f"str {value!r}" if len(value) <= 60 else f"str of {len(value):,} characters"
        case bytes():
            return f"bytes of {len(value):,}"
        case Skipped():
            return f"{value.kind} of {value.size:,} bytes"
        case Dict():
            return _count("dict", len(value) // 2)
        case tuple() | list():
            return _count(type(value).__name__, len(value))
        case Global():
            return f"the name `{value.name}`"
        case Object(items=list() as items) if value.name.startswith("builtins."):
            return _count(value.name.removeprefix("builtins."), len(items))
        case Object():
            return f"object `{value.name}`"
    return type(value).__name__


def _count(kind: str, count: int) -> str:
    return f"{kind} of {count:,} {'entry' if count == 1 else 'entries'}"

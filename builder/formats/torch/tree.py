"""Which tensors an unpickled value holds, and under which names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from builder.base.errors import Place, Problem, SourceError
from builder.formats.checkpoint import WRAPPERS as MODULES
from builder.formats.torch.pickles import Dict, Global, Object, Skipped
from builder.formats.torch.tensors_in_pickles import Storage, TensorRef

# Where trainers put the state dict, each also within another; the first of equals wins.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "ema")

# A `model.` before every name is a wrapper's only if a full checkpoint's own first words come after it.
_FIRST_WORDS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")

# Attributes in which a module keeps its parts; its state dict's names are without them.
_MODULE_PARTS = frozenset({"_modules", "_parameters", "_buffers"})

MAX_NAMES = 64 << 20  # characters of all names together, each of them counted as
_A_NAME = 200  # more than it has, for what is remembered beside it
MAX_OTHERS = 10_000  # entries that are described; the rest is counted


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


_CONTAINERS = frozenset({Dict, list, tuple, Object})
_TENSORS = frozenset({TensorRef, Storage})


def _values(value: object) -> Iterator[object]:
    """What a container holds, or a tensor's attributes do."""
    if type(value) is Dict:
        yield from value[1::2]
    elif type(value) is list or type(value) is tuple:
        yield from value
    elif type(value) is Object:
        yield from value.args
        yield from value.items or ()
        yield from (value.pairs or [])[1::2]
    if isinstance(value, (Dict, Object, TensorRef)) and value.state is not None:
        yield value.state


class _Same:
    """Stands where a part has no key, since it is to be named as what holds it."""


def _keyed(value: object, attributes: bool) -> Iterator[tuple[object, object]]:
    """The same parts as `_values`, each after its key; `attributes` are those of an object."""
    if type(value) is Dict:
        for key, part in value.pairs():
            yield _Same if attributes and type(key) is str and key in _MODULE_PARTS else key, part
    elif type(value) is list or type(value) is tuple:
        # Attributes and slots come as a pair, as does what was set twice.
        pair = attributes and len(value) == 2 and all(v is None or type(v) in (Dict, tuple) for v in value)
        yield from ((_Same if pair else i, v) for i, v in enumerate(value))
    elif type(value) is Object:
        yield from ((f"args.{i}", v) for i, v in enumerate(value.args))
        yield from enumerate(value.items or ())
        pairs = value.pairs or []
        yield from zip(pairs[::2], pairs[1::2], strict=True)
    if isinstance(value, (Dict, Object, TensorRef)) and value.state is not None:
        yield _Same, value.state


def _is_container(value: object) -> bool:
    return type(value) in _CONTAINERS or (type(value) is TensorRef and value.state is not None)


class _Walk:
    """Two passes over a graph that may be deep, shared and cyclic: which parts hold tensors; their names."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found = Found()
        self.budget = MAX_NAMES
        self.untold = 0
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
        if self.untold:
            self.found.others["(more)"] = f"{self.untold:,} entries"
        return self.found

    def survey(self, root: object) -> None:
        """Visit every container once, and learn which of them hold tensors."""
        todo = [(iter((root,)), -1)]
        while todo:
            values, parent = todo[-1]
            for value in values:
                kind = type(value)
                if kind in _TENSORS and parent >= 0:
                    self.holds[parent] = True
                if (kind not in _CONTAINERS and kind is not TensorRef) or id(value) in self.index:
                    continue
                if _is_container(value):
                    here = self.index[id(value)] = len(self.containers)
                    self.containers.append(value)
                    self.parents.append(parent)
                    self.holds.append(False)
                    todo.append((_values(value), here))
                    break
            else:
                todo.pop()
        for here in range(len(self.containers) - 1, 0, -1):
            if self.holds[here]:
                self.holds[self.parents[here]] = True

    def emit(self, root: object, main: Dict | None, strip: int) -> None:
        """Name every tensor, and describe the outermost parts that hold none."""
        entered: set[int] = set()
        todo: list[tuple[str, object, int, bool, bool]] = [("", root, -1, False, False)]
        while todo:
            name, value, parent, attributes, quiet = todo.pop()
            if isinstance(value, (TensorRef, Storage)):
                self.tensor(name if parent >= 0 else "value", value)
                if not _is_container(value):
                    continue
                quiet = True
            elif not _is_container(value):
                self.other(name or "value", value)
                continue
            here = self.index[id(value)]
            if here in entered or self.parents[here] != parent:
                if not quiet:
                    self.other(name, value, "a part of the file that is met elsewhere too")
                continue
            entered.add(here)
            if not quiet and type(value) is Object:
                self.other(name or "(the whole file)", value)
            # An object is described as a whole; of its inside only tensors matter.
            hush = quiet or type(value) is Object
            inside = []
            for key, part in _keyed(value, attributes):
                same = key is _Same
                if type(part) in _TENSORS or (_is_container(part) and self.worth(part, here)):
                    if same:
                        word = name
                    elif value is main and isinstance(part, TensorRef):
                        word = _word(key)[strip:]
                    else:
                        word = f"{name}.{_word(key)}" if name else _word(key)
                    self.spend(word)
                    inside.append((word, part, here, same and hush, hush or same))
                elif hush or same:
                    continue
                elif len(self.found.others) >= MAX_OTHERS:
                    self.untold += 1
                else:
                    self.other(f"{name}.{_word(key)}" if name else _word(key), part)
            todo += reversed(inside)

    def worth(self, part: object, parent: int) -> bool:
        """Whether a container is to be entered, or was already."""
        here = self.index[id(part)]
        return self.holds[here] or self.parents[here] != parent

    def spend(self, name: str) -> None:
        self.budget -= len(name) + _A_NAME
        if self.budget < 0:
            raise SourceError(
                Problem(
                    "the file's tensors are too many, or too deep within each other, to be named",
                    Place(self.file),
                    (f"their names take more than {MAX_NAMES:,} characters",),
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

    def other(self, name: str, value: object, text: str | None = None) -> None:
        others = self.found.others
        if len(others) >= MAX_OTHERS or name in others:
            self.untold += 1
            return
        self.spend(name)
        others[name] = text or _describe(value)


def _state_dict(root: object) -> tuple[tuple[str, ...], Dict | None]:
    """The path and the value of the dict that names the tensors."""
    if type(root) is not Dict:
        return (), None
    outer = _wrapped(root)
    inner = {id(part): _wrapped(part) for _, part in outer}
    candidates: list[tuple[tuple[str, ...], Dict]] = [
        ((), root),
        *(((word,), part) for word, part in outer),
        *(((word, below), found) for word, part in outer for below, found in inner[id(part)]),
    ]
    counts: dict[int, int] = {}  # by identity: one dict may be at every word
    for _, part in candidates:
        if id(part) not in counts:
            counts[id(part)] = sum(isinstance(v, TensorRef) for _, v in part.pairs())
    best = max(candidates, key=lambda c: counts[id(c[1])])
    return best if counts[id(best[1])] else ((), None)


def _wrapped(value: Dict) -> list[tuple[str, Dict]]:
    parts = {k: v for k, v in value.pairs() if type(k) is str and k in _WRAPPERS and type(v) is Dict}
    return [(word, parts[word]) for word in _WRAPPERS if word in parts]


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
        if word not in MODULES and not (word == "model." and any(n.startswith(inside) for n in names)):
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

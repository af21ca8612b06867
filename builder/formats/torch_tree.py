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

# A `model.` before every name is a wrapper's only if full checkpoints' own first words come after it.
_FIRST_WORDS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")

# Attributes in which a module keeps its parts; they are not in the names of its state dict either.
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
    a prefix that a wrapper put before all of them; all others by their whole path from the root. A
    container that is met again is listed once, a tensor each time.

    Raises SourceError when two tensors have one name, or names are absurdly long.
    """
    return _Walk(file).run(root)


def _entries(value: object, attributes: bool) -> Iterator[tuple[str | None, object]]:
    """A container's parts with the word that each adds to the path, None for what adds none."""
    if type(value) is Dict:
        for key, part in zip(value[::2], value[1::2], strict=True):
            word = _word(key)
            yield (None if attributes and word in _MODULE_PARTS else word), part
    elif type(value) is list or type(value) is tuple:
        if attributes and len(value) == 2 and all(v is None or type(v) is Dict for v in value):
            yield from ((None, v) for v in value)
        else:
            yield from ((str(i), v) for i, v in enumerate(value))
    elif type(value) is Object:
        if type(value.args) is tuple:
            yield from ((f"args.{i}", v) for i, v in enumerate(value.args))
        yield from ((str(i), v) for i, v in enumerate(value.items or ()))
        pairs = value.pairs or []
        yield from ((_word(k), v) for k, v in zip(pairs[::2], pairs[1::2], strict=True))
    if isinstance(value, (Dict, Object, TensorRef)) and value.state is not None:
        yield None, value.state


_CONTAINERS = (Dict, list, tuple, Object)


class _Walk:
    def __init__(self, file: str) -> None:
        self.file = file
        self.found = Found()
        self.budget = MAX_NAMES
        self.containers: list[object] = []  # in order of their first visit
        self.parents: list[int] = []
        self.index: dict[int, int] = {}  # id -> place in `containers`
        self.holds: list[bool] = []

    def run(self, root: object) -> Found:
        self.survey(root)
        path, main = _state_dict(root)
        prefix = _prefix(main)
        self.found.nesting = ".".join(path) + ("." if path and prefix else "") + prefix.rstrip(".")
        self.emit(root, main, len(prefix))
        return self.found

    def survey(self, root: object) -> None:
        """Visit every container once, and learn which of them hold tensors."""
        todo: list[tuple[object, int, bool]] = [(root, -1, False)]
        while todo:
            value, parent, attributes = todo.pop()
            if isinstance(value, (TensorRef, Storage)) and parent >= 0:
                self.holds[parent] = True
            if not _is_container(value) or id(value) in self.index:
                continue
            here = self.index[id(value)] = len(self.containers)
            self.containers.append(value)
            self.parents.append(parent)
            self.holds.append(isinstance(value, TensorRef))
            inner = type(value) is Object
            parts = [
                (part, here, word is None and (inner or attributes))
                for word, part in _entries(value, attributes)
                if _is_container(part) or isinstance(part, (TensorRef, Storage))
            ]
            todo += reversed(parts)
        for here in range(len(self.containers) - 1, 0, -1):
            if self.holds[here]:
                self.holds[self.parents[here]] = True

    def emit(self, root: object, main: object, strip: int) -> None:
        """Name every tensor, and describe the highest containers that hold none."""
        todo: list[tuple[str, object, int, bool, bool]] = [("", root, -1, False, False)]
        names: dict[int, str] = {}
        while todo:
            path, value, parent, attributes, quiet = todo.pop()
            if isinstance(value, (TensorRef, Storage)):
                self.tensor(path, value)
            if not _is_container(value):
                if not quiet and not isinstance(value, (TensorRef, Storage)):
                    self.other(path, _describe(value))
                continue
            here = self.index[id(value)]
            if here in names or self.parents[here] != parent:
                if not quiet and not isinstance(value, TensorRef):
                    self.other(path, "a second mention of what is elsewhere in the file")
                continue
            names[here] = path
            if not self.holds[here]:
                if not quiet:
                    self.other(path, _describe(value))
                continue
            inner = type(value) is Object
            if inner and not quiet:
                self.other(path, _describe(value))
            parts = []
            for word, part in _entries(value, attributes):
                if value is main and isinstance(part, TensorRef) and word is not None:
                    name = word[strip:]
                else:
                    name = path if word is None else f"{path}.{word}" if path else word
                self.spend(name)
                parts.append(
                    (name, part, here, word is None and (inner or attributes), inner or word is None)
                )
            todo += reversed(parts)

    def spend(self, name: str) -> None:
        self.budget -= len(name)
        if self.budget < 0:
            raise SourceError(
                Problem(
                    "the file's tensors are nested too deeply to be named",
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


def _is_container(value: object) -> bool:
    return type(value) in _CONTAINERS or (isinstance(value, TensorRef) and value.state is not None)


def _tensors(value: Dict) -> list[str]:
    return [_word(k) for k, v in zip(value[::2], value[1::2], strict=True) if isinstance(v, TensorRef)]


def _wrapped(path: tuple[str, ...], value: object) -> Iterator[tuple[tuple[str, ...], Dict]]:
    if type(value) is Dict:
        parts = {
            k: v for k, v in zip(value[::2], value[1::2], strict=True) if type(k) is str and k in _WRAPPERS
        }
        for word in _WRAPPERS:
            part = parts.get(word)
            if type(part) is Dict:
                yield (*path, word), part


def _state_dict(root: object) -> tuple[tuple[str, ...], Dict | None]:
    if type(root) is not Dict:
        return (), None
    outer = list(_wrapped((), root))
    candidates = [((), root), *outer, *(c for path, part in outer for c in _wrapped(path, part))]
    counts = [len(_tensors(part)) for _, part in candidates]
    return candidates[counts.index(max(counts))] if any(counts) else ((), None)


def _prefix(main: Dict | None) -> str:
    """What stands before every tensor's name because of a wrapper around the module."""
    names = _tensors(main) if main else []
    prefix = ""
    while names:
        here = names[0].partition(".")[0] + "."
        if not all(n.startswith(here) and len(n) > len(here) for n in names):
            break
        names = [n[len(here) :] for n in names]
        if here not in _PREFIXES and not (
            here == "model." and any(n.startswith(_FIRST_WORDS) for n in names)
        ):
            break
        prefix += here
    return prefix


def _word(key: object) -> str:
    if type(key) is str:
        return key
    if key is None or type(key) in (bool, int, float):
        return str(key)
    return key.decode("utf-8", "backslashreplace") if type(key) is bytes else _describe(key)


_NUMPY_SCALARS = {"f2": "<e", "f4": "<f", "f8": "<d", "i4": "<i", "i8": "<q", "u1": "<B", "b1": "<?"}


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

"""The operation that runs methods of sd-mecha, tensor by tensor."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from builder.base.errors import OutputError, Problem, did_you_mean
from builder.base.words import counted
from builder.operations.merging import Merge, Site
from builder.operations.registry import Param
from builder.tensors.lazy import LazyTensor
from builder.tensors.merged import Whole

if TYPE_CHECKING:
    import torch

PACKAGE, RELEASE = "sd-mecha", "1.1.8"  # another release may compute something else
BASE = "base"
DELTA, WEIGHT = frozenset({"delta"}), frozenset({"weight"})
INSTALL = f"`pip install {PACKAGE}=={RELEASE}`"


class _Unfit(Exception):
    """What is wrong with a step, as a problem."""

    def __init__(self, fact: str, hint: str | None = None, *evidence: str) -> None:
        super().__init__(fact)
        self.problem = Problem(fact, evidence=evidence, hint=hint)


@dataclass(frozen=True)
class Method:
    """A method of sd-mecha: the kinds of its models, and of its parameters with what they have by default.

    `spaces` are the merge spaces of its models, one for each, of those without end that of the `rest`.
    """

    inner: Any
    name: str
    spaces: tuple[frozenset[str], ...]
    tables: tuple[bool, ...]  # which of the models it takes as a state dict
    rest: frozenset[str] | None
    rest_table: bool
    params: Mapping[str, tuple[type, Any, bool]]  # type, default, whether it is given by place
    gives: frozenset[str]

    def deltas(self, count: int, based: bool) -> tuple[bool, ...]:
        """Which of so many models it gets as their difference from a base.

        With a base those are that may be either, unless others must be.
        """
        spaces = (*self.spaces, *[self.rest or frozenset()] * (count - len(self.spaces)))[:count]
        must = tuple(s == DELTA for s in spaces)
        return must if any(must) or not based else tuple(s != WEIGHT for s in spaces)

    def gives_delta(self, deltas: Sequence[bool]) -> bool:
        """Whether what it gives is a difference too."""
        if len(self.gives) == 1:
            return self.gives == DELTA
        first = self.spaces[0] if self.spaces else self.rest
        return bool(deltas) and deltas[0] and first != DELTA

    def __call__(self, tensors: Sequence[torch.Tensor], said: Mapping[str, Any]) -> Any:
        """What it makes of tensors, which it may change."""
        import torch

        key = "tensor"
        tables = (*self.tables, *[self.rest_table] * (len(tensors) - len(self.tables)))
        args: list[Any] = [{key: t} if table else t for t, table in zip(tensors, tables, strict=True)]
        named: dict[str, Any] = {}
        for name, (kind, default, placed) in self.params.items():
            value = said.get(name, default)
            if value is None and name.endswith("seed"):
                value = 0
            if value is not None:
                value = torch.tensor(float(value)) if kind is torch.Tensor else kind(value)
            if placed:
                args.append(value)
            else:
                named[name] = value
        context, cache = self.inner.instantiate(), self.inner.create_cache()
        return self.inner.merge_key(args, named, key, None, cache, context, False)


@lru_cache(maxsize=64)
def find(name: str) -> Method:
    """A method by its name; raises _Unfit where there is none that runs tensor by tensor."""
    try:
        release = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise _Unfit(f"`mecha:{name}` needs {PACKAGE} {RELEASE}, which is not installed", INSTALL) from None
    if release != RELEASE:
        raise _Unfit(f"`mecha:{name}` needs {PACKAGE} {RELEASE}, and {release} is installed", INSTALL)
    known = {m.identifier: m for m in importlib.import_module("sd_mecha.extensions.merge_methods").get_all()}
    if name not in known:
        hint = did_you_mean(name, [n for n, m in known.items() if _described(m) is not None])
        raise _Unfit(f"{PACKAGE} has no method `{name}`", hint)
    found = _described(known[name])
    if found is None:
        raise _Unfit(f"`{name}` of {PACKAGE} works on whole models: it cannot run tensor by tensor")
    return found


def _described(inner: Any) -> Method | None:
    """A method as it is run; None for one that needs more than a tensor of each model."""
    import torch

    types, names, spaces = inner.get_input_types(), inner.get_param_names(), inner.get_input_merge_spaces()
    defaults, gives = inner.get_default_args(), inner.get_signature().return_annotation.data
    if (
        inner.interface is not None
        or hasattr(inner.__wrapped__, "map_keys")
        or gives.interface is not torch.Tensor
    ):
        return None
    given = len(names.args) - len(defaults.args)
    if any(config is not None for config in inner.get_input_configs().as_dict().values()):
        return None
    tables = [_is_table(t) for t in types.args[:given]]
    rest = types.vararg if types.has_varargs() else None
    if None in tables or (rest is not None and _is_table(rest) is None) or not (given or rest is not None):
        return None
    params = {
        n: (t, d, True) for n, t, d in zip(names.args[given:], types.args[given:], defaults.args, strict=True)
    } | {n: (types.kwargs[n], defaults.kwargs.get(n), False) for n in names.kwargs}
    if any(kind not in (torch.Tensor, float, int, bool, str) for kind, _, _ in params.values()):
        return None
    return Method(
        inner,
        inner.identifier,
        tuple(_space(s) for s in spaces.args[:given]),
        tuple(map(bool, tables)),
        None if rest is None else _space(spaces.vararg),
        bool(_is_table(rest)),
        params,
        _space(gives.merge_space),
    )


def _is_table(kind: Any) -> bool | None:
    """Whether a model is asked for as a state dict of tensors; None for what is neither that nor a tensor."""
    import torch

    if kind is torch.Tensor:
        return False
    return True if "StateDict[torch.Tensor]" in str(kind) else None


def _space(space: Any) -> frozenset[str]:
    """The names of the merge spaces that something may be in."""
    each = space if hasattr(space, "__iter__") else [space]
    return frozenset(s.identifier for s in each) - {"param"}


# ── as an operation ──


def _check(params: Mapping[str, Any], inputs: Sequence[str]) -> Problem | None:
    try:
        method = find(params["method"])
        for fact, hint in _wrong(method, params.get("params", {}), inputs):
            raise _Unfit(fact, hint)
    except _Unfit as unfit:
        return unfit.problem
    return None


def _wrong(
    method: Method, said: Mapping[str, Any], inputs: Sequence[str]
) -> Iterator[tuple[str, str | None]]:
    models, based = [i for i in inputs if i != BASE], BASE in inputs
    due, name = len(method.spaces), f"`mecha:{method.name}`"
    if len(models) < due or (method.rest is None and len(models) > due):
        yield f"{name} takes {counted(due, 'model')}, not {len(models)}", None
        return
    deltas = method.deltas(len(models), based)
    if not based and (any(deltas) or method.gives_delta(deltas)):
        what = "takes differences" if any(deltas) else "gives a difference"
        yield f"{name} {what}, and not models", 'add `base = "…"`, the model that they are differences from'
    for key, value in said.items():
        if key not in method.params:
            known = ", ".join(f"`{n}`" for n in method.params)
            near = did_you_mean(key, method.params) or (f"it has {known}" if known else "it has none")
            yield f"{name} has no parameter `{key}`", near
            continue
        kind = method.params[key][0]
        if not _fits(kind, value):
            what = {bool: "true or false", str: "a string", int: "an integer"}.get(kind, "a number")
            yield f"`{key}` of {name} must be {what}", None


def _fits(kind: type, value: Any) -> bool:
    if kind in (bool, str):
        return type(value) is kind
    return type(value) in (int, float) and (kind is not int or float(value).is_integer())


def _make(sources: Sequence[LazyTensor], site: Site) -> LazyTensor:
    method = find(site["method"])
    keys = site["keys"]
    order = [i for i, key in enumerate(keys) if key != BASE]
    at = keys.index(BASE) if BASE in keys else None
    deltas = method.deltas(len(order), at is not None)

    def function(*whole: torch.Tensor) -> torch.Tensor:
        base = whole[at] if at is not None else 0.0
        models = [whole[i] - base if delta else whole[i] for i, delta in zip(order, deltas, strict=True)]
        shape = sources[0].shape
        try:
            found = _tensor(method(models, site.params.get("params", {})), shape)
        except Exception as error:  # of a program that is not ours
            fact, why = f"mecha:{method.name} fails on `{site.name}`", f"{type(error).__name__}: {error}"
            raise OutputError(Problem(fact, evidence=(why,))) from error
        return found + base if method.gives_delta(deltas) else found

    return site.as_made(Whole(sources, function))


def _tensor(found: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """What a method gave, which may be a number or have another shape where all are of one element."""
    import torch

    made = torch.as_tensor(found, dtype=torch.float32)
    return made.expand(shape) if made.numel() == 1 and not made.shape else made.reshape(shape)


_MERGE = Merge(
    "mecha",
    f"A method of {PACKAGE} {RELEASE} by its name there, run on one tensor of each model after the other: "
    "`a`, `b`, `c` and those of `of`, by name, are its models. What it takes as differences are those from "
    "`base`, and so is what it then gives. Without a seed it has 0, for each tensor the same.",
    ("a",),
    _make,
    {
        "method": Param("string", "The name of the method."),
        "params": Param("values", "Its parameters, by their names there.", {}),
    },
    many="of",
    weighted=False,
    version=int("".join(f"{int(n):02}" for n in RELEASE.split("."))),  # another release, another key
)
MECHA = replace(
    _MERGE.operation,
    optional_inputs=("b", "c", BASE),
    of_methods=True,
    check=_check,
)

"""What an operation is: its inputs and parameters, and how it turns mappings into a mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from builder.base.errors import Problem
from builder.tensors.lazy import LazyTensor

Kind = Literal["number", "integer", "string", "boolean", "choice", "weights", "values"]
Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Param:
    """A parameter of an operation: its kind, bounds (inclusive) and default.

    Without a default it must be given, unless it is `optional`: then it may be None.
    """

    kind: Kind
    doc: str
    default: Any = None
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    optional: bool = False


@dataclass(frozen=True)
class Setting:
    """What an operation is told of its place beside inputs and parameters.

    `cls` is the class that is made; `block` gives the block of a tensor, None for one of no block;
    `constants` are tensors that no operation touches. `modules` says what the names that adapters use mean
    in the tensors of a class (None: as the catalog has it), `extracted` what of a class adapters are
    extracted for, by the names that they give it; `metadata` is what files say, by key. With the arithmetic
    `file`, every product and sum is rounded to the type of the inputs.
    """

    cls: str
    block: Callable[[str], str | None] = lambda name: None
    constants: tuple[str, ...] = ()
    modules: Callable[[str, Tensors | None], Mapping[str, Mapping[str, Any]]] = lambda cls, tensors: {}
    extracted: Callable[[str, Tensors, bool], Mapping[str, Any]] = lambda cls, tensors, convolutions: {}
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    arithmetic: Literal["exact", "file"] = "exact"


class Applied(NamedTuple):
    """What an operation makes, and what is to be said of it, in words."""

    tensors: Tensors
    words: tuple[str, ...] = ()


Apply = Callable[[Mapping[str, Tensors], Mapping[str, Any], Setting], Applied]


@dataclass(frozen=True)
class Operation:
    """A named mapping → mapping.

    `inputs` and `optional_inputs` are the keys that name a source or a step; `many` is one that holds a
    list of them, or where they are `weighted` a table, each with a weight of its own. `apply` gets the
    inputs' components of one class by key (those of a list or table by `KEY.NAME`), each a mapping of
    unprefixed names to numbers (what is packed is decoded), and the canonical parameters; it computes
    nothing yet. With `whole_models`, it gets
    their other classes too, by `KEY@CLASS`. Of the inputs whose keys are `files`, it gets all that each
    holds, and the model's `classes` as a parameter. `version` is part of every key: a change of the result
    must change it.

    One that `makes_file` is asked once for all tensors of an adapter's file, under the names that they have
    there: it gets all classes of its models by `KEY@CLASS`, and may read them to know which tensors there
    are. What the file says of itself follows from its parameters and what its input says: `metadata`.

    One `of_methods` is spelt `NAME:METHOD`, and has that as its parameter `method`. `check` says, while
    nothing is read yet, what is wrong with parameters and the keys of inputs, if anything is.

    `any_of` and `excludes` are parameters one of which must be given, and those that exclude others.
    """

    name: str
    version: int
    doc: str
    inputs: tuple[str, ...]
    apply: Apply
    optional_inputs: tuple[str, ...] = ()
    many: str | None = None
    weighted: bool = True
    whole_models: bool = False
    files: tuple[str, ...] = ()
    makes_file: bool = False
    metadata: Callable[[Mapping[str, Any], Mapping[str, str]], Mapping[str, str]] = lambda params, said: said
    of_methods: bool = False
    check: Callable[[Mapping[str, Any], Sequence[str]], Problem | None] = lambda params, inputs: None
    any_of: tuple[str, ...] = ()
    excludes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    params: Mapping[str, Param] = field(default_factory=dict)

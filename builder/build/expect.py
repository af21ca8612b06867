"""What a recipe asserts about its products, compared with what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from builder.base.errors import Problem
from builder.models.metric import Metric
from builder.recipe import Output, Recipe


class Built(NamedTuple):
    """An output as it is: `state` is `written` or `unchanged`, digests are hex, `metric` empty for none.

    `autov3` has 64 digits, or none where nobody expects it. `files` is the SHA-256 of a folder's files that
    hold no tensors, by path in it; `beside` are the names of files put beside the output, each with its
    SHA-256. `statement` is where one of it was written.
    """

    name: str
    path: Path
    sha256: str
    size: int
    tensor_digest: str
    metric: str
    state: str
    autov3: str = ""
    files: Mapping[str, str] = MappingProxyType({})
    beside: tuple[tuple[str, str], ...] = ()
    statement: Path | None = None


def missed(recipe: Recipe, output: Output, made: Built) -> list[Problem]:
    """Every expectation that is missed, with both values."""
    expect = output.expect
    at = ("expect",) if "expect" in recipe.document.data else (*output.at, "expect")
    wanted = {
        "metric": (expect.metric, made.metric or Metric().text),
        "sha256": (expect.sha256, made.sha256),
        "tensor_digest": (expect.tensor_digest, made.tensor_digest),
        "autov3": (expect.autov3, made.autov3[: len(expect.autov3 or "")] or "none"),
        "size": (expect.size, made.size),
    }
    return [
        Problem(
            f"the {_NAMES.get(key, key)} of `{output.file}` is not what the recipe expects",
            recipe.place(*at, key, value=True),
            (f"expected {want}", f"made     {got}"),
        )
        for key, (want, got) in wanted.items()
        if want is not None and not _meets(key, want, got)
    ]


_NAMES = {"tensor_digest": "tensor digest", "autov3": "AutoV3"}


def _meets(key: str, want: object, got: object) -> bool:
    if key != "metric":
        return want == got
    pairs = list(zip(str(want).split("/"), str(got).split("/"), strict=False))
    return len(pairs) == 3 and all(_near(w, g) for w, g in pairs)


def _near(want: str, got: str) -> bool:
    """Whether two parts of a metric agree: digits may be off by one, as it is published."""
    return want == got or ((want + got).isdigit() and abs(int(want) - int(got)) <= 1)

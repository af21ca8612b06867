"""What licences of models ask for, and where those of a model and of its sources contradict each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import tomli

from builder.base.errors import Problem, clipped


@dataclass(frozen=True)
class Terms:
    """What a licence says, by its name at Hugging Face where it has one there.

    `commercial`: it may be used for money; `limited`: by some alone, as those of little revenue, or in some
    ways. `derivatives`: what is made of it may be shared. `alike`: that has to be under the same licence.
    `uses`: some uses are forbidden, also to those who get what is made of it. One that is `other` at Hugging
    Face has its name beside that, and a `link` to its text if that is at one place.
    """

    name: str
    commercial: bool = True
    limited: bool = False
    derivatives: bool = True
    alike: bool = False
    uses: bool = False
    other: bool = False
    link: str = ""


_DATA = tomli.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
LICENCES: Mapping[str, Terms] = {
    name: Terms(name, link=_DATA["other"].get(name, ""), other=name in _DATA["other"], **terms)
    for terms in _DATA["licences"]
    for name in terms.pop("names")
}


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", text[:200].casefold())


_BY_PLAIN = {_plain(n): t for n, t in LICENCES.items()} | {
    spelt: LICENCES[name] for spelt, name in _DATA["spellings"].items()
}


def terms_of(text: str) -> Terms | None:
    """The licence that a text names, however it is spelt; None for one that is not known."""
    return _BY_PLAIN.get(_plain(text))


def contradictions(product: Terms | None, sources: Mapping[str, Terms]) -> Iterator[Problem]:
    """Where the licences of a model, if that is known, and of its sources, by name, contradict each other.

    What is found is for a person to judge: it is no advice, and says nothing of what is not known.
    """
    for name, terms in sources.items():
        asks = (_asks(name, terms),)
        if not terms.derivatives:
            yield Problem(f"nothing that is made of `{name}` may be shared, by its licence", evidence=asks)
        if product is None:
            continue
        if product.commercial and not terms.commercial:
            yield _clash(product, "allows commercial use", name, asks)
        elif _freer(product, terms):
            yield _clash(product, "allows any commercial use", name, asks)
        if terms.uses and not product.uses:
            yield _clash(product, "passes on no restrictions of use", name, asks)
        if terms.alike and product not in _taken(terms):
            yield _clash(product, "is another one", name, asks)
    for (one, first), (other, second) in combinations(sources.items(), 2):
        if _excludes(first, second) or _excludes(second, first):
            evidence = (_asks(one, first), _asks(other, second))
            yield Problem(f"the licences of `{one}` and `{other}` exclude each other", evidence=evidence)


def _clash(product: Terms, what: str, name: str, asks: tuple[str, ...]) -> Problem:
    hint = "choose a licence for `license` that grants no more than the sources do"
    return Problem(f"the licence `{product.name}` {what}: that of `{name}` is against it", None, asks, hint)


def _freer(one: Terms, other: Terms) -> bool:
    """Whether one licence allows more commercial use than another."""
    return one.commercial and (not other.commercial or (other.limited and not one.limited))


def _taken(alike: Terms) -> set[Terms]:
    """The licences that what has to be under one may be under: that itself, and those it takes instead."""
    instead = _DATA["instead"].get(alike.name)
    return {alike} if instead is None else {alike} | _taken(LICENCES[instead])


def _excludes(alike: Terms, other: Terms) -> bool:
    """Whether what has to be under one licence alone cannot keep what another asks for."""
    if not alike.alike:
        return False
    if other.alike:
        return not _taken(alike) & _taken(other)
    return _freer(alike, other) or (other.uses and not alike.uses)


def _asks(name: str, terms: Terms) -> str:
    said = [
        ("nothing made of it shared", not terms.derivatives),
        ("no commercial use", not terms.commercial),
        ("commercial use by some or in some ways only", terms.limited),
        ("the same licence for what is made of it", terms.alike),
        ("some uses forbidden, to everybody after", terms.uses),
    ]
    asked = [words for words, so in said if so]
    return f"{name}: {clipped(terms.name, 100)}" + (f" ({'; '.join(asked)})" if asked else "")

"""What licences of models ask for, and where those of a model and of its sources contradict each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from builder.base.errors import Problem, clipped


@dataclass(frozen=True)
class Terms:
    """What a licence says, by its name at Hugging Face where it has one there.

    `commercial`: it may be used for money; `limited`: by some alone, as those of little revenue, or in some
    ways. `derivatives`: what is made of it may be shared. `alike`: that has to be under the same licence.
    `uses`: some uses are forbidden, also to those who get what is made of it. `link` leads to the text of one
    that Hugging Face has no name for.
    """

    name: str
    commercial: bool = True
    limited: bool = False
    derivatives: bool = True
    alike: bool = False
    uses: bool = False
    link: str = ""

    @property
    def other(self) -> bool:
        """Whether it is `other` at Hugging Face, and has its name beside that."""
        return self.name in _OTHER


def _all(*names: str, **terms: bool) -> dict[str, Terms]:
    return {name: Terms(name, link=_OTHER.get(name, ""), **terms) for name in names}


# Of those that are `other` at Hugging Face, with a name: where their text is, if at one place.
_OTHER = {
    "flux-1-dev-non-commercial-license": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    "flux-non-commercial-license": "https://huggingface.co/black-forest-labs/FLUX.2-dev/blob/main/LICENSE.txt",
    "stabilityai-ai-community": "https://stability.ai/license",
    "stabilityai-nc-research-community": "",
    "sai-nc-community": "",
    "fair-ai-public-license-1.0-sd": "https://freedevproject.org/faipl-1.0-sd/",
}
LICENCES: Mapping[str, Terms] = {
    **_all("mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "unlicense", "wtfpl"),
    **_all("cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cdla-permissive-2.0"),
    # RAIL asks for its restrictions of use in whatever licence what is made of it has, and for nothing else.
    **_all("creativeml-openrail-m", "openrail++", "openrail", "bigscience-openrail-m", uses=True),
    **_all("bigscience-bloom-rail-1.0", "bigcode-openrail-m", "gemma", uses=True),
    **_all("cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", alike=True),
    **_all("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", commercial=False),
    **_all("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", commercial=False, alike=True),
    **_all("cc-by-nd-4.0", derivatives=False),
    **_all("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", commercial=False, derivatives=False),
    **_all("deepfloyd-if-license", commercial=False, uses=True),
    # Rights to derivatives are granted by Black Forest Labs alone, and by this licence.
    **_all("flux-1-dev-non-commercial-license", commercial=False, alike=True, uses=True),
    **_all("flux-non-commercial-license", commercial=False, alike=True, uses=True),
    # Commercial use is for those of less than a million dollars of revenue a year.
    **_all("stabilityai-ai-community", limited=True, uses=True),
    **_all("stabilityai-nc-research-community", "sai-nc-community", commercial=False, uses=True),
    **_all("fair-ai-public-license-1.0-sd", alike=True, uses=True),
}
# What licences that ask for themselves take in their place: later versions, and those named as compatible.
_INSTEAD: Mapping[str, tuple[str, ...]] = {
    "cc-by-sa-3.0": ("cc-by-sa-4.0",),
    "cc-by-sa-4.0": ("gpl-3.0",),
    "cc-by-nc-sa-2.0": ("cc-by-nc-sa-3.0",),
    "cc-by-nc-sa-3.0": ("cc-by-nc-sa-4.0",),
    "lgpl-3.0": ("gpl-3.0",),
    "gpl-3.0": ("agpl-3.0",),
}
# As people, and the metadata of files, write them.
_ALIASES = {
    "creativemlopenrailmlicense": "creativeml-openrail-m",
    "creativemlopenrail++mlicense": "openrail++",
    "creativemlopenrail++m": "openrail++",
    "openrail++m": "openrail++",
    "openrailm": "openrail",
    "apache2": "apache-2.0",
    "apachelicense20": "apache-2.0",
    "apachelicenseversion20": "apache-2.0",
    "mitlicense": "mit",
    "cc0": "cc0-1.0",
    "gplv3": "gpl-3.0",
    "agplv3": "agpl-3.0",
    "flux1devnoncommercial": "flux-1-dev-non-commercial-license",
    "stabilityaicommunity": "stabilityai-ai-community",
    "stabilityaicommunitylicense": "stabilityai-ai-community",
    "faipl10sd": "fair-ai-public-license-1.0-sd",
    "fairaipubliclicense10sd": "fair-ai-public-license-1.0-sd",
}


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", text[:200].casefold())


_BY_PLAIN = {**{_plain(n): t for n, t in LICENCES.items()}, **{a: LICENCES[n] for a, n in _ALIASES.items()}}


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
    return {alike}.union(*(_taken(LICENCES[name]) for name in _INSTEAD.get(alike.name, ())))


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

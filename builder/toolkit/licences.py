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

    `commercial`: it may be used for money. `derivatives`: something may be made of it. `alike`: what is made
    of it has to be under the same licence. `uses`: some uses are forbidden, also to those who get what is
    made of it.
    """

    name: str
    commercial: bool = True
    derivatives: bool = True
    alike: bool = False
    uses: bool = False


def _all(*names: str, **terms: bool) -> dict[str, Terms]:
    return {name: Terms(name, **terms) for name in names}


LICENCES: Mapping[str, Terms] = {
    **_all("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "unlicense", "wtfpl", "cc0-1.0"),
    **_all("cc-by-2.0", "cc-by-3.0", "cc-by-4.0"),
    **_all("creativeml-openrail-m", "openrail++", "openrail", "bigscience-openrail-m", uses=True),
    **_all("cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", alike=True),
    **_all("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", commercial=False),
    **_all("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", commercial=False, alike=True),
    **_all("cc-by-nd-4.0", derivatives=False),
    **_all("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", commercial=False, derivatives=False),
    # At Hugging Face these are `other`, with a name.
    **_all("flux-1-dev-non-commercial-license", "flux-non-commercial-license", commercial=False, uses=True),
    **_all("stabilityai-ai-community", "stabilityai-nc-research-community", commercial=False, uses=True),
    **_all("sai-nc-community", commercial=False, uses=True),
    **_all("fair-ai-public-license-1.0-sd", alike=True, uses=True),
}
OTHER = (
    "flux-1-dev-non-commercial-license",
    "flux-non-commercial-license",
    "stabilityai-ai-community",
    "stabilityai-nc-research-community",
    "sai-nc-community",
    "fair-ai-public-license-1.0-sd",
)
# As people, and the metadata of files, write them.
_ALIASES = {
    "creativemlopenrailmlicense": "creativeml-openrail-m",
    "creativemlopenrail++mlicense": "openrail++",
    "creativemlopenrail++m": "openrail++",
    "openrailm": "openrail",
    "apache2": "apache-2.0",
    "apachelicense20": "apache-2.0",
    "mitlicense": "mit",
    "cc0": "cc0-1.0",
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
            yield Problem(f"nothing may be made of `{name}`, by its licence", evidence=asks)
        if product is None:
            continue
        if product.commercial and not terms.commercial:
            yield _clash(product, "allows commercial use", name, asks)
        if terms.uses and not product.uses:
            yield _clash(product, "passes on no restrictions of use", name, asks)
        if terms.alike and terms.name in LICENCES and product.name != terms.name:
            yield _clash(product, "is another one", name, asks)
    for (one, first), (other, second) in combinations(sources.items(), 2):
        if first.name != second.name and (_excludes(first, second) or _excludes(second, first)):
            evidence = (_asks(one, first), _asks(other, second))
            yield Problem(f"the licences of `{one}` and `{other}` exclude each other", evidence=evidence)


def _clash(product: Terms, what: str, name: str, asks: tuple[str, ...]) -> Problem:
    hint = "choose a licence for `license` that grants no more than the sources do"
    return Problem(f"the licence `{product.name}` {what}: that of `{name}` is against it", None, asks, hint)


def _excludes(alike: Terms, other: Terms) -> bool:
    """Whether what has to be under one licence alone cannot keep what another asks for."""
    if not alike.alike:
        return False
    stricter = (alike.commercial and not other.commercial) or (other.uses and not alike.uses)
    return other.alike or stricter


def _asks(name: str, terms: Terms) -> str:
    said = [
        ("nothing made of it", not terms.derivatives),
        ("no commercial use", not terms.commercial),
        ("the same licence for what is made of it", terms.alike),
        ("some uses forbidden, to everybody after", terms.uses),
    ]
    asked = [words for words, so in said if so]
    return f"{name}: {clipped(terms.name, 100)}" + (f" ({'; '.join(asked)})" if asked else "")

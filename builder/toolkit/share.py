"""What a page about a model needs: recipe and lock, a model card, and the fields that Civitai asks for."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from builder.base.addresses import Address, Civitai, HuggingFace, parse_address
from builder.base.disk import check_free, check_place, new_folder, write_bytes
from builder.base.errors import CkptError, LockError, OutputError, Problem, SourceError, printable
from builder.base.files import read_bounded
from builder.base.inside import leads_out
from builder.base.progress import human_bytes
from builder.base.words import command_line
from builder.plan.folders import vocabulary_names
from builder.recipe import Output, Recipe
from builder.recipe import lock as locks
from builder.recipe.lock import Lock, LockedOutput, LockedSource, lock_path
from builder.recipe.names import SINGLE
from builder.recipe.profiles import MAX_SIDECAR, MAX_VOCABULARY
from builder.recipe.read import MAX_SIZE
from builder.reports.inspect import Report, build_report
from builder.sources.find import hash_files
from builder.sources.have import source_jobs
from builder.sources.job import SourceJob
from builder.sources.net.failure import Failure
from builder.sources.net.hosts import StatedTerms, stated_terms
from builder.sources.opened import Sources
from builder.toolkit.licences import LICENCES, Terms, contradictions, terms_of
from builder.workspace import Workspace, need_lock

if TYPE_CHECKING:
    from builder.models.catalog import Catalog

CARD, FIELDS = "README.md", "civitai.json"
LONGEST = 200  # characters of a licence's name


@dataclass(frozen=True)
class Parent:
    """A source as a page names it: `entry` is its name in the lock, `address` where others can have it.

    `licence` is what is said of its licence, empty where nothing is; `terms` what that means, if known;
    `unasked` why a host did not say more.
    """

    entry: str
    locked: LockedSource
    address: str
    repo: str | None
    licence: str
    terms: Terms | None
    unasked: str = ""


@dataclass(frozen=True)
class Shared:
    """What was written: `folder`, the names of its files, and the fields of a page as plain values."""

    folder: Path
    files: tuple[str, ...]
    fields: dict[str, Any]


def share(
    recipe: Recipe, workspace: Workspace, sources: Sources, folder: Path | None = None, threads: int = 2
) -> Shared:
    """Write a folder with all that a page needs of a recipe that was built; warns of what is amiss with it.

    Licences are asked for at the hosts of the sources, unless the network is off. Raises LockError where
    the recipe was not built as it is, OutputError where `folder` is taken or an output is another one.
    """
    assert recipe.path is not None
    folder = folder or recipe.path.with_name(f"{recipe.path.stem}-page")
    check_free(folder)
    check_place(folder / "README.md" if folder.is_dir() else folder)
    lock = need_lock(recipe)
    if lock.recipe != recipe.digest or not lock.outputs.keys() >= {o.name for o in recipe.outputs}:
        fact = f"the lock says nothing of what `{recipe.path.name}` makes as it is now"
        hint = f"`{command_line('build', recipe.path)}` builds it and writes the lock"
        raise LockError(Problem(fact, hint=hint))
    hosts = _Hosts(workspace)
    parents = [_parent(job, lock, sources, hosts) for job in source_jobs(recipe, sources, lock)]
    files = [
        _file(recipe, output, lock.outputs[output.name], workspace, threads) for output in recipe.outputs
    ]
    licence = next((t for o in recipe.outputs if (t := _licence(o.metadata))), "")
    for problem in _warnings(recipe, licence, parents):
        workspace.reporter.warn(problem)
    fields = _fields(recipe, licence, parents, files)
    written = {
        recipe.path.name: read_bounded(recipe.path, MAX_SIZE),
        lock_path(recipe.path).name: read_bounded(recipe.lock or lock_path(recipe.path), locks.MAX_SIZE),
        CARD: _card(recipe, licence, parents, fields).encode(),
        FIELDS: (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode(),
        **dict(_beside(recipe, recipe.path.parent, workspace.catalog)),
    }
    with new_folder(folder) as made:
        for name, data in written.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(made / name, data)
    return Shared(folder, tuple(written), fields)


def _beside(recipe: Recipe, root: Path, catalog: Catalog) -> Iterator[tuple[str, bytes]]:
    """What a recipe needs beside it: those that it includes, configurations, and files of tokenizers."""
    assert recipe.path is not None
    for inner in recipe.included.values():
        assert inner.path is not None
        yield _below(inner.path, root), read_bounded(inner.path, MAX_SIZE)
        yield from _beside(inner, root, catalog)
    for output in recipe.outputs:
        if output.config is not None:
            path = recipe.path.parent / output.config
            yield _below(path, root), read_bounded(path, MAX_SIDECAR, follow=False)
        for name in vocabulary_names(catalog.layouts.values()) if output.tokenizer is not None else ():
            path = recipe.path.parent / (output.tokenizer or "") / name
            if path.is_file() and leads_out(root, _below(path, root)) is None:
                yield _below(path, root), read_bounded(path, MAX_VOCABULARY)


def _below(path: Path, root: Path) -> str:
    """A path from the recipe's folder; raises OutputError for one that is of this machine alone."""
    if not path.is_relative_to(root):
        fact = f"`{path}` is named by a path of one machine: others will not find it there"
        raise OutputError(Problem(fact, hint="name it relative to the recipe"))
    return path.relative_to(root).as_posix()


# -- sources


class _Hosts:
    """What hosts state of licences; one that cannot be reached is asked once."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._gone: dict[type[Address], str] = {}

    def terms(self, address: Address) -> StatedTerms | str | None:
        """What the host of an address states, None where that is nothing, or why nobody knows."""
        if not isinstance(address, (HuggingFace, Civitai)):
            return None  # such a host states nothing
        if self._workspace.offline:
            return f"{address} was not asked: the network is off"
        if (why := self._gone.get(type(address))) is not None:
            return f"{address} was not asked: {why}"
        try:
            return stated_terms(address, self._workspace.network())
        except Failure as failure:
            if failure.retry or failure.wait is not None:  # not of this model alone
                self._gone[type(address)] = failure.fact
            return f"{address}: {failure.fact}"


def _parent(job: SourceJob, lock: Lock, sources: Sources, hosts: _Hosts) -> Parent:
    locked = lock.sources.get(job.entry)
    if locked is None:
        raise LockError(Problem(f"the lock says nothing of the source `{job.entry}`", job.place))
    known = sources.catalog.known.file(locked.sha256)
    published = [f"hf://{known.hf}"] if known is not None and known.hf else []
    named = [parse_address(a) for a in (*sources.addresses(job), *published)]
    addresses = [a for a in named if not str(a).startswith("file:")]
    hub = next((a for a in addresses if isinstance(a, HuggingFace)), None)
    said, unasked = _licence(_metadata(job, sources)), ""
    terms = terms_of(said)
    for address in addresses if terms is None else ():
        stated = hosts.terms(address)
        if isinstance(stated, str):
            unasked = unasked or stated
        elif stated is not None:
            said, terms = _named(stated, address)
            break
    where = str(addresses[0]) if addresses else ""
    return Parent(job.entry, locked, where, hub.repo if hub else None, said, terms, unasked)


def _named(stated: StatedTerms, address: Address) -> tuple[str, Terms | None]:
    """What a host states as the name of a licence, and what that means, if it is known."""
    if stated.name is not None:
        return stated.name[:LONGEST], terms_of(stated.name)
    assert isinstance(address, Civitai)
    name = f"the permissions on its page at {address.host}"
    allowed = (stated.commercial, stated.limited, stated.derivatives, stated.alike)
    return name, Terms(name, *allowed)


def _metadata(job: SourceJob, sources: Sources) -> Mapping[str, str]:
    """The metadata of a source that is here; nothing of one that is not, or is refused."""
    with suppress(CkptError):
        if sources.find(job) is not None:
            return sources.open(job).checkpoint.metadata
    return {}


def _licence(metadata: Mapping[str, str]) -> str:
    said = metadata.get("license") or metadata.get("modelspec.license") or ""
    return printable(" ".join(said.split()))[:LONGEST]


def _warnings(recipe: Recipe, licence: str, parents: list[Parent]) -> Iterator[Problem]:
    """What one who shares the recipe should know."""
    hint = 'say it as `license = "…"` under [metadata], by its name at Hugging Face'
    if not licence:
        names = {p.licence for p in parents if p.terms is not None and p.terms.name in LICENCES}
        alike = len(names) == 1 and all(p.licence in names for p in parents)
        evidence = (f"that of every source is {next(iter(names))}",) if alike else ()
        yield Problem(f"no licence is said of `{recipe.name}`", evidence=evidence, hint=hint)
    elif terms_of(licence) is None:
        fact = f"the licence `{licence}` is not known, and not compared with those of the sources"
        yield Problem(fact, hint=hint)
    unknown = [
        f"{p.entry}: {'; '.join(filter(None, (p.licence, p.unasked))) or 'nothing is said'}"
        for p in parents
        if p.terms is None
    ]
    if unknown:
        fact = "not all licences of the sources are known"
        yield Problem(fact, evidence=tuple(unknown), hint="look at their pages")
    yield from contradictions(terms_of(licence), {p.entry: p.terms for p in parents if p.terms is not None})
    lost = tuple(f"{p.entry}: {p.locked.requested}" for p in parents if not p.address)
    if lost:
        hint = "`urls` of a source says where; it is no part of what the recipe means"
        yield Problem("others cannot have every source: no address is known", evidence=lost, hint=hint)


# -- outputs


def _file(
    recipe: Recipe, output: Output, locked: LockedOutput, workspace: Workspace, threads: int
) -> dict[str, Any]:
    """What is said of an output, with all hashes where it is here."""
    path = recipe.target(output)
    said: dict[str, Any] = {
        "name": PurePosixPath(output.file).name,
        "bytes": locked.size,
        "sizeKB": locked.size / 1024,
        "hashes": {"SHA256": locked.sha256.upper()},
        "tensorDigest": locked.tensor_digest,
        "metric": locked.metric or None,
    }
    if output.form in SINGLE:
        said["hashes"]["AutoV2"] = locked.sha256[:10].upper()
    try:
        same = hash_files(path, workspace.store, workspace.reporter) == locked.sha256
    except (SourceError, OSError):
        fact = f"`{path}` is not here: of its hashes only those that follow from the lock are given"
        workspace.reporter.warn(Problem(fact, hint=f"`{command_line('build', recipe.path)}` makes it"))
        return said
    if not same:
        fact = f"`{path}` is not what the lock says"
        raise OutputError(Problem(fact, hint=f"`{command_line('build', recipe.path)}` makes it anew"))
    report = build_report(
        path,
        catalog=workspace.catalog,
        metric=False,
        hashes=True,
        threads=threads,
        reporter=workspace.reporter,
    )
    hashes = {k: str(report.hashes[k]).upper() for k in _HASHES if report.hashes.get(k)}
    return {**said, "hashes": said["hashes"] | hashes, **_described(report, output, workspace.catalog)}


# Those of Civitai's, under its names.
_HASHES = ("AutoV1", "AutoV2", "AutoV3", "SHA256", "CRC32", "BLAKE3")
_CONTAINERS: Mapping[str, str] = {
    "safetensors": "SafeTensor",
    "sharded": "SafeTensor",
    "torch": "PickleTensor",
    "gguf": "GGUF",
    "diffusers": "Diffusers",
}
_PRECISIONS = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}


def _described(report: Report, output: Output, catalog: Catalog) -> dict[str, Any]:
    bytes_of: Counter[str] = Counter()
    for tensor in report.tensors.values():
        bytes_of[tensor.dtype.code] += tensor.nbytes
    widest = bytes_of.most_common(1)[0][0] if bytes_of else ""
    metadata = {
        "format": _CONTAINERS[output.form],
        "size": "full" if report.ema.keys or report.junk.keys else "pruned",
        "fp": output.quantize or _PRECISIONS.get(widest, widest.lower()),
    }
    site = catalog.sites.get("civitai", {})
    models, kinds = site.get("models", {}), site.get("kinds", {})
    lineage = report.lineage.model if report.lineage is not None else None
    return {
        "type": "Pruned Model" if metadata["size"] == "pruned" else "Model",
        "metadata": metadata,
        "architecture": report.identity.architecture,
        "modelType": kinds.get(report.kind.kind) if report.kind is not None else None,
        "baseModel": models.get(lineage or "") or models.get(report.identity.architecture or ""),
    }


# -- the page


def _fields(
    recipe: Recipe, licence: str, parents: list[Parent], files: list[dict[str, Any]]
) -> dict[str, Any]:
    """What Civitai's forms ask for, under the names of its API; None: a person has to say it."""
    first = next((f for f in files if "baseModel" in f), {})
    tags = [*_tags(recipe), *(["merge"] if _relation(recipe, parents) == "merge" else [])]
    return {
        "schema": 1,
        "name": recipe.name,
        "description": recipe.description,
        "type": first.get("modelType"),
        "baseModel": first.get("baseModel"),
        "tags": list(dict.fromkeys(tags)),
        "license": licence or None,
        "recipe": {"digest": recipe.digest, "file": recipe.path.name if recipe.path else None},
        "files": [{k: v for k, v in f.items() if k not in ("modelType", "baseModel")} for f in files],
        "lineage": [
            {
                "name": p.entry,
                "file": p.locked.requested,
                "sha256": p.locked.sha256,
                "bytes": p.locked.size,
                "address": p.address or None,
                "license": p.licence or None,
            }
            for p in parents
        ],
    }


def _tags(recipe: Recipe) -> list[str]:
    said = (o.metadata.get(k, "") for o in recipe.outputs for k in ("tags", "modelspec.tags"))
    return [" ".join(t.split()) for tags in said for t in tags.split(",") if t.strip()]


def _relation(recipe: Recipe, parents: list[Parent]) -> str | None:
    """What the model is to those that it is made of, in Hugging Face's words."""
    if len(parents) > 1:
        return "merge"
    return "quantized" if all(o.quantize for o in recipe.outputs) else None


def _card(recipe: Recipe, licence: str, parents: list[Parent], fields: Mapping[str, Any]) -> str:
    """The model card: front matter as Hugging Face reads it, and a page for people."""
    front = _front_matter(recipe, licence, parents, fields["tags"])
    about = [_plain(recipe.description), ""] if recipe.description else []
    name = fields["recipe"]["file"]
    files = [
        (
            f["name"],
            human_bytes(f["bytes"]),
            f.get("metadata", {}).get("fp", ""),
            f["hashes"]["SHA256"].lower(),
        )
        for f in fields["files"]
    ]
    sources = [(p.entry, p.locked.requested, p.locked.sha256, p.licence, p.address) for p in parents]
    lines = [
        *("---", *_yaml(front), "---", ""),
        *(f"# {_plain(recipe.name)}", "", *about),
        *("## Files", "", *_table(("file", "size", "precision", "SHA-256"), files), ""),
        *("## The recipe", ""),
        *(f"{_plain(name)} and its lock make these files with `ckpt-build`, byte for byte:", ""),
        *(f"    {command_line('build', name, '--locked')}", ""),
        *("## Made of", "", *_table(("source", "file", "SHA-256", "licence", "address"), sources), ""),
    ]
    return "\n".join(lines)


def _front_matter(recipe: Recipe, licence: str, parents: list[Parent], tags: list[str]) -> dict[str, Any]:
    """What Hugging Face is told of a model; a licence that it has no name for is `other`, with its name."""
    known = terms_of(licence)
    front: dict[str, Any] = {}
    if known is not None and not known.other:
        front["license"] = known.name
    elif licence:
        front |= {"license": "other", "license_name": _slug(known.name if known else licence)}
    if known is not None and known.link:
        front["license_link"] = known.link
    repos = list(dict.fromkeys(p.repo for p in parents if p.repo is not None))
    if repos:
        front["base_model"] = repos
        if (relation := _relation(recipe, parents)) is not None:
            front["base_model_relation"] = relation
    return {**front, "tags": list(dict.fromkeys([*tags, "ckpt-build"]))}


def _yaml(front: Mapping[str, Any]) -> Iterator[str]:
    """Front matter: strings in double quotes, as JSON writes them, are YAML too."""
    for key, value in front.items():
        if isinstance(value, list):
            yield f"{key}:"
            yield from (f"- {_quoted(item)}" for item in value)
        else:
            yield f"{key}: {_quoted(value)}"


def _quoted(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z][\w./+-]*", text, re.ASCII) and text.casefold() not in _NO_TEXT
    return text if plain else json.dumps(printable(text), ensure_ascii=False)


# Words that YAML takes for truth values, or for nothing.
_NO_TEXT = frozenset({"y", "yes", "n", "no", "on", "off", "true", "false", "null"})


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.casefold()).strip("-.") or "unknown"


def _plain(text: str) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", printable(" ".join(text.split())))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *(tuple(_plain(c) for c in row) for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]

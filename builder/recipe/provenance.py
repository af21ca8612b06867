"""What an output was made of, as others read it: an in-toto statement with SLSA's predicate of provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import __version__
from builder.base.files import parse_json
from builder.base.inside import is_name
from builder.recipe.lock import Lock, LockedComponent, LockedOutput, LockedSource
from builder.recipe.profiles import CONFIG
from builder.recipe.recipe import meaning_digest

ENDING = ".intoto.json"  # of a statement's name, behind that of its output
MAX_SIZE = 4 << 20  # bytes
PAYLOAD = "application/vnd.in-toto+json"  # what an envelope calls a statement
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
TOOL = "pkg:pypi/ckpt-build"
BUILD = f"{TOOL}#recipe/v1"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@dataclass(frozen=True)
class Statement:
    """What is said of an output.

    `subjects` is the SHA-256 of each of its files, by path from the statement's folder. `recipe` is what the
    recipe means for it, `output` its name there, `container` the form that it has. `lock` is what a lock
    would say of it and of what it is made of; `locked` names the lock's file, with its SHA-256, where one
    says just that. `times` are when the build began and ended, in UTC: all else is the same on every machine.
    """

    subjects: Mapping[str, str]
    recipe: Mapping[str, Any]
    output: str
    container: str
    lock: Lock
    locked: tuple[str, str] | None = None
    times: tuple[str, str] | None = None

    @property
    def file(self) -> str | None:
        """The name of the output's one file, a configuration beside it aside; None where it has several."""
        found = [name for name in self.subjects if not name.endswith(CONFIG)]
        return found[0] if len(found) == 1 and "/" not in found[0] else None

    def to_text(self) -> str:
        """The statement as JSON."""
        return json.dumps(self._data(), indent=2, allow_nan=False) + "\n"

    def _data(self) -> dict[str, Any]:
        made = self.lock.outputs[self.output]
        parameters = {
            "recipe": self.recipe,
            "recipeDigest": {"sha256": meaning_digest(self.recipe)},
            "output": self.output,
            "container": self.container,
            **({"date": made.date} if made.date else {}),
        }
        times = dict(zip(("startedOn", "finishedOn"), self.times, strict=True)) if self.times else {}
        return {
            "_type": STATEMENT,
            "subject": [{"name": n, "digest": {"sha256": d}} for n, d in sorted(self.subjects.items())],
            "predicateType": PREDICATE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD,
                    "externalParameters": parameters,
                    "internalParameters": {"numericProfile": self.lock.profile},
                    "resolvedDependencies": [_source(n, s) for n, s in sorted(self.lock.sources.items())],
                },
                "runDetails": {
                    "builder": {"id": TOOL, "version": {"ckpt-build": __version__}},
                    **({"metadata": times} if times else {}),
                    "byproducts": list(self._byproducts(made)),
                },
            },
        }

    def _byproducts(self, made: LockedOutput) -> Iterator[dict[str, Any]]:
        for c in sorted(self.lock.components, key=lambda c: c.cls):
            said = {"component": c.component, "source": c.source, "tensors": c.tensors}
            yield _byproduct("component", c.cls, {"tensorDigest": c.blake3}, **said)
        metric = {"metric": made.metric} if made.metric else {}
        yield _byproduct(
            "output", self.output, {"tensorDigest": made.tensor_digest}, size=made.size, **metric
        )
        if self.locked is not None:
            yield _byproduct("lock", self.locked[0], {"sha256": self.locked[1]})


def _source(name: str, source: LockedSource) -> dict[str, Any]:
    uri = {"uri": source.resolved} if source.resolved and not source.resolved.startswith("file:") else {}
    return {
        "name": name,
        **uri,
        "digest": {"sha256": source.sha256},
        "annotations": {"requested": source.requested, **({"size": source.size} if source.size else {})},
    }


def _byproduct(kind: str, name: str, digest: dict[str, str], **said: Any) -> dict[str, Any]:
    return {"name": name, "digest": digest, "annotations": {"kind": kind, **said}}


def statement_path(output: Path) -> Path:
    """Where the statement of an output lies: beside it, under its name and `.intoto.json`."""
    return output.with_name(output.name + ENDING)


def parse_object(text: bytes | str) -> dict[str, Any]:
    """An object of JSON in which no name stands twice, as programs differ in which they take.

    Raises ValueError, in words that quote nothing of it.
    """
    try:
        data = parse_json(text, object_pairs_hook=_once, parse_constant=_no_number)
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg.lower()}, line {error.lineno}") from None
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_number(text: str) -> None:
    raise ValueError("it holds what is no number")


def read_statement(data: Mapping[str, Any]) -> Statement:
    """The statement of a JSON object; raises ValueError, in words. What it does not know it passes over."""
    for key, known in (("_type", STATEMENT), ("predicateType", PREDICATE)):
        if data.get(key) != known:
            raise ValueError(f"its `{key}` is not `{known}`")
    predicate = _get(data, "predicate", dict)
    definition, details = _get(predicate, "buildDefinition", dict), _get(predicate, "runDetails", dict)
    if definition.get("buildType") != BUILD:
        raise ValueError(f"it is of another build: its `buildType` is not `{BUILD}`")
    parameters = _get(definition, "externalParameters", dict)
    recipe, output = _get(parameters, "recipe", dict), _get(parameters, "output", str)
    if parameters.get("recipeDigest") != {"sha256": meaning_digest(recipe)}:
        raise ValueError("it contradicts itself: its `recipeDigest` is not that of its `recipe`")
    parts = _get(details, "byproducts", list)
    made = _of_kind(parts, "output")
    if len(made) != 1:
        raise ValueError("its `byproducts` hold no one output")
    subjects = {_path(s): _digest(s, "sha256") for s in _objects(data, "subject")}
    if not subjects or len(subjects) != len(data["subject"]):
        raise ValueError("its `subject` names no file, or one twice")
    locked = [(_get(p, "name", str), _digest(p, "sha256")) for p in _of_kind(parts, "lock")]
    lock = Lock(
        recipe="",
        sources=dict(map(_dependency, _objects(definition, "resolvedDependencies"))),
        components=tuple(_component(p, output) for p in _of_kind(parts, "component")),
        outputs={output: _output(made[0], subjects, _get(parameters, "date", str, ""))},
        profile=_get(_get(definition, "internalParameters", dict), "numericProfile", int),
    )
    return Statement(
        subjects,
        recipe,
        output,
        _get(parameters, "container", str),
        lock,
        locked[0] if locked else None,
        _times(_get(details, "metadata", dict, {})),
    )


def _dependency(part: Mapping[str, Any]) -> tuple[str, LockedSource]:
    notes, sha256 = _get(part, "annotations", dict, {}), _digest(part, "sha256")
    requested, size = _get(notes, "requested", str, ""), _get(notes, "size", int, 0)
    return _get(part, "name", str), LockedSource(requested, sha256, size, _get(part, "uri", str, ""))


def _component(part: Mapping[str, Any], output: str) -> LockedComponent:
    notes, digest = part["annotations"], _digest(part, "tensorDigest")
    component, source = _get(notes, "component", str), _get(notes, "source", str)
    return LockedComponent(
        output, _get(part, "name", str), component, source, digest, _get(notes, "tensors", int)
    )


def _output(part: Mapping[str, Any], subjects: Mapping[str, str], date: str) -> LockedOutput:
    notes, digest = part["annotations"], _digest(part, "tensorDigest")
    files = [sha256 for name, sha256 in subjects.items() if not name.endswith(CONFIG)]
    sha256 = files[0] if len(files) == 1 else ""
    return LockedOutput("", sha256, digest, _get(notes, "size", int), _get(notes, "metric", str, ""), date)


def _times(said: Mapping[str, Any]) -> tuple[str, str] | None:
    if not said:
        return None
    times = _get(said, "startedOn", str), _get(said, "finishedOn", str)
    if not all(map(_TIME.fullmatch, times)):
        raise ValueError("its times are none")
    return times


def _path(subject: Mapping[str, Any]) -> str:
    name: str = _get(subject, "name", str)
    if len(name) > 4000 or not all(map(is_name, name.split("/"))):
        raise ValueError("the `name` of a `subject` is no path within its folder")
    return name


_WORDS = {str: "string", int: "whole number", dict: "object", list: "list"}
_REQUIRED = object()


def _get(table: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    found = table.get(key, default)
    if type(found) is not kind:
        raise ValueError(f"its `{key}` is no {_WORDS[kind]}")
    return found


def _objects(table: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _get(table, key, list)
    if not all(isinstance(f, dict) for f in found):
        raise ValueError(f"its `{key}` are no objects")
    return found


def _of_kind(parts: list[Any], kind: str) -> list[dict[str, Any]]:
    """The by-products that are called so."""
    notes = [p.get("annotations") if isinstance(p, dict) else None for p in parts]
    return [p for p, n in zip(parts, notes, strict=True) if isinstance(n, dict) and n.get("kind") == kind]


def _digest(owner: Mapping[str, Any], algorithm: str) -> str:
    found: str = _get(_get(owner, "digest", dict), algorithm, str)
    if _DIGEST.fullmatch(found) is None:
        raise ValueError(f"a `{algorithm}` is no digest of 64 hex digits")
    return found

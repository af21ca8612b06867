"""What the hosts say of a file before it is downloaded: its digest, size and commit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from builder.base.addresses import Address, Civitai, HuggingFace, LocalFile, Web
from builder.base.files import parse_json
from builder.sources.net.client import REDIRECTS, Response, Session, origin_of
from builder.sources.net.failure import Failure

MAX_ANSWER = 4 << 20  # bytes of an answer of an API; those of models with many versions have 1 MB
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Pin:
    """What an address stands for: `url` names the same file for ever, as far as its host can promise.

    `url` is an address again and holds no token. `sha256` and `size` are what the host states, None
    where it states nothing.
    """

    url: str
    sha256: str | None = None
    size: int | None = None
    revision: str | None = None


def pin_of(address: Address, session: Session) -> Pin:
    """What the host of an address states of its file, without downloading it. Raises Failure."""
    if isinstance(address, HuggingFace):
        return session.retrying(lambda: _hugging_face_pin(address, session))
    if isinstance(address, Civitai):
        return _civitai_pin(address, session)
    return Pin(str(address))


def by_hash(sha256: str, session: Session) -> Pin | None:
    """The file of this SHA-256 at Civitai; None when Civitai does not know it. Raises Failure."""
    url = f"{session.civitai_endpoint()}/api/v1/model-versions/by-hash/{sha256.upper()}"
    said = _ask(session, url, absent=True)
    if said is None:
        return None
    for file in _files(said):
        if _digest(file) == sha256:
            return _file_pin(Civitai(_number(said, "id"), _number(file, "id")), file)
    return None


def download_url(address: Address, session: Session) -> str:
    """The web address that the bytes come from. Raises Failure."""
    match address:
        case Web(url):
            return url
        case HuggingFace():
            return _resolve_url(address, session)
        case Civitai():
            if address.version is None or address.format is not None:
                return download_url(_chosen(address, session), session)
            file = f"?fileId={address.file}" if address.file is not None else ""
            return f"{session.civitai_endpoint(address.host)}/api/download/models/{address.version}{file}"
        case LocalFile():
            raise AssertionError("a file has no web address")


def _resolve_url(address: HuggingFace, session: Session) -> str:
    if session.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise Failure("not asked: `HF_HUB_OFFLINE` is set")
    revision = quote(address.revision, safe="")
    return f"{session.hugging_face.endpoint}/{address.repo}/resolve/{revision}/{quote(address.path)}"


def _hugging_face_pin(address: HuggingFace, session: Session) -> Pin:
    response = session.request("HEAD", _resolve_url(address, session), across=False)
    try:
        if response.status != 200 and response.status not in REDIRECTS:
            raise response.failure()
        return _stated(address, response)
    finally:
        response.close()


def _stated(address: HuggingFace, response: Response) -> Pin:
    """From the headers of the file's `resolve` address, whose tag is the SHA-256 of a file in LFS."""
    headers = response.headers
    commit = headers.get("X-Repo-Commit", "")
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise Failure(
            f"`{address}` is answered without a commit", hint="`HF_ENDPOINT` names another kind of host"
        )
    tag = headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
    size = headers.get("X-Linked-Size", "")
    return Pin(
        str(replace(address, revision=commit)),
        tag if _SHA256.fullmatch(tag) else None,
        int(size) if re.fullmatch(r"[0-9]{1,15}", size) else None,
        commit,
    )


def _civitai_pin(address: Civitai, session: Session) -> Pin:
    version = _version(address, session)
    file = _chosen_file(address, version)
    return _file_pin(_exact(address, version, file), file)


def _chosen(address: Civitai, session: Session) -> Civitai:
    version = _version(address, session)
    return _exact(address, version, _chosen_file(address, version))


def _exact(address: Civitai, version: dict[str, Any], file: dict[str, Any]) -> Civitai:
    return Civitai(_number(version, "id"), _number(file, "id"), host=address.host)


def _version(address: Civitai, session: Session) -> dict[str, Any]:
    api = f"{session.civitai_endpoint(address.host)}/api/v1"
    if address.version is not None:
        said = _ask(session, f"{api}/model-versions/{address.version}")
    else:
        model = _ask(session, f"{api}/models/{address.model}")
        versions = _objects((model or {}).get("modelVersions"))
        said = versions[0] if versions else None  # the newest comes first
    if said is None:
        raise Failure(f"`{address}` has no published version")
    return said


def _chosen_file(address: Civitai, version: dict[str, Any]) -> dict[str, Any]:
    files = _files(version)
    if address.file is not None:
        files = [f for f in files if f.get("id") == address.file]
    if address.format is not None:
        # AIR names say `safetensor` or `safetensors`; Civitai's API says `SafeTensor`.
        files = [f for f in files if any(w.startswith(address.format[:4]) for w in _formats(f))]
    chosen = next((f for f in files if f.get("primary")), files[0] if files else None)
    if chosen is None:
        raise Failure(f"`{address}` is not among the files of version {_number(version, 'id')}")
    return chosen


def _formats(file: dict[str, Any]) -> tuple[str, str]:
    """What a file is by its host's word, and by its suffix."""
    metadata = file.get("metadata")
    said = metadata.get("format") if isinstance(metadata, dict) else None
    return str(said or "").lower(), str(file.get("name") or "").lower().rpartition(".")[2]


def _files(version: dict[str, Any]) -> list[dict[str, Any]]:
    return _objects(version.get("files"))


def _objects(said: object) -> list[dict[str, Any]]:
    return [o for o in said if isinstance(o, dict)] if isinstance(said, list) else []


def _digest(file: dict[str, Any]) -> str | None:
    hashes = file.get("hashes")
    said = str(hashes.get("SHA256") or "").lower() if isinstance(hashes, dict) else ""
    return said if _SHA256.fullmatch(said) else None


def _file_pin(address: Civitai, file: dict[str, Any]) -> Pin:
    # Sizes are stated in KiB, sometimes rounded: only a whole number of bytes is one.
    said = file.get("sizeKB")
    size = said * 1024 if isinstance(said, (int, float)) and 0 <= said < 1e12 else None
    whole = int(size) if size is not None and size == int(size) else None
    return Pin(str(address), _digest(file), whole, str(address.version))


@dataclass(frozen=True, slots=True)
class StatedTerms:
    """What a host says of a model's licence: its name, or else what it allows, as licences do."""

    name: str | None = None
    commercial: bool = False
    limited: bool = False
    derivatives: bool = False
    alike: bool = False


def stated_terms(address: Address, session: Session) -> StatedTerms | None:
    """What the host of an address states of the licence of the model there; None: nothing. Raises Failure."""
    if isinstance(address, HuggingFace):
        said = _ask(session, f"{session.hugging_face.endpoint}/api/models/{address.repo}", absent=True)
        card = (said or {}).get("cardData")
        names = [card.get(key) for key in ("license_name", "license")] if isinstance(card, dict) else []
        return next((StatedTerms(n) for n in names if isinstance(n, str) and n), None)
    if not isinstance(address, Civitai):
        return None
    model = address.model if address.version is None else _number(_version(address, session), "modelId")
    said = _ask(session, f"{session.civitai_endpoint(address.host)}/api/v1/models/{model}", absent=True) or {}
    keys = ("allowCommercialUse", "allowDerivatives", "allowDifferentLicense")
    commercial, derivatives, other = (said.get(key) for key in keys)
    if not said.keys() & set(keys):
        return None
    uses = set(re.findall(r"[A-Za-z]+", str(commercial))) - {"None"}  # a list, or one written as a word
    return StatedTerms(
        commercial=bool(uses),
        limited=bool(uses) and "Sell" not in uses,  # images, or at some hosts, and not what is made of it
        derivatives=derivatives is not False,
        alike=other is False,
    )


def _number(said: dict[str, Any], key: str) -> int:
    number = said.get(key)
    if type(number) is not int or not 0 <= number < 10**12:
        raise Failure(f"Civitai's answer has no `{key}`")
    return number


def _ask(session: Session, url: str, *, absent: bool = False) -> dict[str, Any] | None:
    """The JSON object at a URL; with `absent`, None when there is none."""

    def ask() -> dict[str, Any] | None:
        response = session.request("GET", url, {"Accept": "application/json"})
        if absent and response.status == 404:
            response.explanation()
            response.close()
            return None
        if response.status != 200:
            raise response.failure()
        try:
            said = parse_json(response.read_all(MAX_ANSWER), strict=False)
        except ValueError:
            said = None
        finally:
            response.close()
        if not isinstance(said, dict):
            raise Failure(f"the answer of `{origin_of(url).host}` is not what its API promises", retry=True)
        return said

    return session.retrying(ask)


def cached(session: Session, address: Address | None, sha256: str | None) -> Path | None:
    """A file that Hugging Face's own tools have downloaded already, not verified; None when there is none.

    By digest in any repository, as blobs are named by it; by commit and path in the address's own.
    """
    root = hugging_face_cache(session.environ)
    if sha256 is not None:
        for blob in sorted(root.glob(f"models--*/blobs/{sha256}")):
            if blob.is_file():
                return blob
    if isinstance(address, HuggingFace) and address.pinned:
        repo = root / f"models--{address.repo.replace('/', '--')}"
        file = repo / "snapshots" / address.revision / address.path
        # Links in a snapshot lead to the repository's blobs; one that leads elsewhere is not followed.
        readable = os.path.isfile(file)  # noqa: PTH113 - never raises, whatever the path
        if readable and file.resolve().is_relative_to(repo.resolve()):
            return file
    return None


def hugging_face_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of Hugging Face's downloads: `HF_HUB_CACHE`, else `HF_HOME`, else by habit."""
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    given = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expanduser(given))  # noqa: PTH111 - never raises

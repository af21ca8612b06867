"""The addresses a source may have: https, hf, civitai, AIR and file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from builder.base.errors import Problem, UsageError, printable


@dataclass(frozen=True, slots=True)
class Web:
    """A file at a URL."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """A file of a model repository, at a branch, tag or commit."""

    repo: str
    path: str
    revision: str = "main"

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else "@" + quote(self.revision, safe="")
        return f"hf://{self.repo}{revision}/{self.path}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which names the same file for ever."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None


# Hosts of one site that have models of their own each. The first is meant where none is named.
CIVITAI_HOSTS = ("civitai.com", "civitai.red", "civitai.green")


@dataclass(frozen=True, slots=True)
class Civitai:
    """A file of a model version; without a version, of the model's newest one.

    Without a file, the version's primary one; `format` chooses among several, as AIR names do. `host` is
    the one of Civitai's that is asked, and that alone.
    """

    version: int | None
    file: int | None = None
    model: int | None = None
    format: str | None = None
    host: str = CIVITAI_HOSTS[0]

    def __str__(self) -> str:
        if self.host != CIVITAI_HOSTS[0]:
            file = f"?fileId={self.file}" if self.file is not None else ""
            return f"https://{self.host}/api/download/models/{self.version}{file}"
        if self.version is not None and self.format is None:
            return f"civitai:{self.version}" + (f"@{self.file}" if self.file is not None else "")
        version = "" if self.version is None else f"@{self.version}"
        file = "" if self.file is None else f"+{self.file}"
        format_ = "" if self.format is None else f".{self.format}"
        return f"urn:air:other:other:civitai:{self.model or 0}{version}{file}{format_}"


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of this machine, absolute or relative to the recipe."""

    path: str

    def __str__(self) -> str:
        return ("file://" if self.path.startswith("/") else "file:") + quote(self.path, safe="/")

    def under(self, base: Path | None) -> Path:
        """The path itself, taken from the folder `base` when it is relative."""
        return Path(self.path) if base is None else base / self.path


Address = Web | HuggingFace | Civitai | LocalFile


def is_pinned(address: Address) -> bool:
    """Whether an address names the same file for ever, as far as its host has such names."""
    if isinstance(address, HuggingFace):
        return address.pinned
    if isinstance(address, Civitai):
        return address.version is not None and address.file is not None and address.format is None
    return True


# What an address may not carry: a recipe and its lock are shared.
_SECRETS = re.compile(
    r"(?i)(?:x-amz-.*|x-goog-.*|.*signature|sig|key-pair-id|policy|.*token|.*api[-_]?key|.*secret|password|auth.*)"
)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# `refs/pr/7` and `refs/convert/x` are revisions with slashes of their own; in any other they are `%2F`.
_REVISION = r"(?:refs/(?:pr|convert)/[^/@]+|[^/@]+)"
_HF = re.compile(rf"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>{_REVISION}))?/(?P<path>.+)")
_HF_WEB = re.compile(rf"/(?P<repo>[^/@]+/[^/@]+)/resolve/(?P<revision>{_REVISION})/(?P<path>.+)")
_HF_FILE_PAGE = re.compile(
    r"(?P<repo>/(?:(?:datasets|spaces)/)?[^/@]+/[^/@]+)/(?:blob|raw|blame)/(?P<path>.+)"
)
_HF_PAGE = re.compile(r"/(?!api/)(?P<repo>[^/@]+/[^/@]+)(?:/|/(?:tree|commits?|discussions)(?:/.*)?)?")
_CIVITAI = re.compile(r"civitai:(?P<version>\d{1,12})(?:@(?P<file>\d{1,12}))?", re.ASCII)
_CIVITAI_WEB = re.compile(r"/api/download/models/(?P<version>\d{1,12})", re.ASCII)
_CIVITAI_PAGE = re.compile(r"/(?P<kind>models|model-versions)/(?P<number>\d{1,12})(?:/.*)?", re.ASCII)
_AIR = re.compile(
    r"(?:urn:)?(?:air:)?(?P<ecosystem>[\w-]+):(?P<type>[\w-]+):(?P<source>[\w-]+):(?P<id>[\w/-]+)"
    r"(?:@(?P<version>[\w-]+))?(?:\+(?P<file>[\w-]+))?(?:\.(?P<format>\w+))?",
    re.ASCII | re.IGNORECASE,
)
FORMS = "`https://…`, `hf://org/name[@revision]/path`, `civitai:VERSION[@FILE]`, `urn:air:…` or `file:…`"


class _Page(ValueError):
    """An address of a page about a file; `hint` says which address is the file's."""

    def __init__(self, text: str, hint: str) -> None:
        super().__init__(f"`{_short(text)}` is a page, not a file")
        self.hint = hint


def parse_address(text: str) -> Address:
    """The address that `text` spells. Raises UsageError when it spells none.

    Web addresses of files on Hugging Face and Civitai become the addresses of those hosts, which state
    digests.
    """
    problem = check_address(text)
    if problem is not None:
        raise UsageError(problem)
    return _parse(text)


def check_address(text: str) -> Problem | None:
    """What is wrong with an address, and what to write instead; None when nothing is."""
    try:
        _parse(text)
    except _Page as page:
        return Problem(str(page), hint=page.hint)
    except ValueError as error:
        return Problem(str(error), hint=f"an address is {FORMS}")
    return None


def _parse(text: str) -> Address:
    if not text.isprintable() or "\\" in text or text != text.strip() or len(text) > 4096:
        raise ValueError(f"`{_short(text)}` is not an address: it holds characters that no address has")
    scheme = text.partition(":")[0].lower()
    if scheme in {"https", "http"}:
        return _web(text)
    if scheme == "hf":
        return _hugging_face(text)
    if scheme == "file":
        return _file(text)
    if found := _CIVITAI.fullmatch(text):
        return Civitai(int(found["version"]), int(found["file"]) if found["file"] else None)
    if found := _AIR.fullmatch(text):
        return _air(text, found)
    raise ValueError(f"`{_short(text)}` is not an address of a known kind")


def _web(text: str) -> Address:
    url = split(text)
    secrets = [key for key, _ in parse_qsl(url.query, keep_blank_values=True) if _SECRETS.fullmatch(key)]
    if secrets:
        raise ValueError(
            f"an address carries a secret in `{_short(secrets[0])}`, which would be shared with the recipe"
        )
    if url.port is None and url.hostname in {"huggingface.co", "hf.co"}:
        return _hugging_face_web(text, url)
    if url.port is None and url.hostname in CIVITAI_HOSTS:
        return _civitai_web(text, url)
    return Web(url.geturl())


def _hugging_face_web(text: str, url: SplitResult) -> HuggingFace | Web:
    if found := _HF_WEB.fullmatch(url.path):
        return _hf(text, unquote(found["repo"]), found["revision"], unquote(found["path"]))
    if found := _HF_FILE_PAGE.fullmatch(url.path):
        raise _Page(text, f"the file is at `https://huggingface.co{found['repo']}/resolve/{found['path']}`")
    if found := _HF_PAGE.fullmatch(url.path):
        raise _Page(text, f"a file of it is `hf://{found['repo']}/PATH`")
    return Web(url.geturl())


def _civitai_web(text: str, url: SplitResult) -> Civitai | Web:
    query = dict(parse_qsl(url.query))
    host = str(url.hostname)
    if found := _CIVITAI_WEB.fullmatch(url.path):
        file = query.pop("fileId", "")
        if not query and (not file or re.fullmatch(r"[0-9]{1,12}", file)):
            return Civitai(int(found["version"]), int(file) if file else None, host=host)
    elif found := _CIVITAI_PAGE.fullmatch(url.path):
        version = found["number"] if found["kind"] == "model-versions" else query.get("modelVersionId", "")
        if re.fullmatch(r"[0-9]{1,12}", version):
            raise _Page(text, f"the file is at `{Civitai(int(version), host=host)}`")
        raise _Page(text, _file_of_a_model(host, int(found["number"])))
    return Web(url.geturl())


def _file_of_a_model(host: str, model: int) -> str:
    where = "where `modelVersionId` in its page's address is the version"
    if host != CIVITAI_HOSTS[0]:
        return f"the file is at `https://{host}/api/download/models/VERSION`, {where}"
    newest = Civitai(None, model=model)
    return f"the file is at `civitai:VERSION`, {where}; of the newest version at `{newest}`"


def split(text: str) -> SplitResult:
    """The parts of a web address in canonical form: lower case host, no default port, no fragment.

    Raises ValueError for one without a host, with credentials in it, or of another scheme.
    """
    try:
        url = urlsplit(text)
        host = (
            (url.hostname or "").encode("idna").decode("ascii")
            if ":" not in (url.hostname or "")
            else url.hostname
        )
        port = url.port
    except ValueError:
        raise ValueError(f"`{_short(text)}` is not a web address") from None
    if url.scheme not in {"https", "http"}:
        raise ValueError(f"`{_short(text)}` is not a web address: `{url.scheme}` is no scheme for a file")
    if not host or not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
        raise ValueError(f"`{_short(text)}` names no host")
    if url.username is not None or url.password is not None:
        raise ValueError("an address holds a user name or password, which would be shared with the recipe")
    netloc = f"[{host}]" if ":" in host else host
    if port is not None and port != DEFAULT_PORTS[url.scheme]:
        netloc += f":{port}"
    path = quote(url.path or "/", safe="/%:@!$&'()*+,;=~")
    return SplitResult(url.scheme, netloc, path, quote(url.query, safe="/?%:@!$&'()*+,;=~"), "")


DEFAULT_PORTS = {"https": 443, "http": 80}


def _hugging_face(text: str) -> HuggingFace:
    found = _HF.fullmatch(text)
    if found is None:
        raise ValueError(f"`{_short(text)}` is not of the form `hf://org/name[@revision]/path`")
    return _hf(text, found["repo"], found["revision"] or "main", found["path"])


def _hf(text: str, repo: str, revision: str, path: str) -> HuggingFace:
    if repo.partition("/")[0] in {"datasets", "spaces"}:
        raise ValueError(f"`{_short(text)}` is not in a model repository")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise ValueError(f"`{_short(repo)}` is not the name of a Hugging Face repository")
    revision = unquote(revision)
    if not safe_path(revision) or not safe_path(path):
        raise ValueError(f"`{_short(text)}` has an empty, `.` or `..` part")
    return HuggingFace(repo, path, revision)


def safe_path(path: str) -> bool:
    """Whether a path of a repository is printable and has no empty, `.` or `..` part."""
    return path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(path.split("/"))


def _air(text: str, found: re.Match[str]) -> Civitai:
    if found["source"].lower() != "civitai":
        raise ValueError(
            f"`{_short(text)}` is at `{found['source']}`; of AIR names only those at `civitai` are known"
        )
    numbers = [found[k] for k in ("id", "version", "file")]
    if any(n is not None and not re.fullmatch(r"[0-9]{1,12}", n) for n in numbers):
        raise ValueError(f"`{_short(text)}` is not an AIR name: model, version and file are numbers")
    model, version, file = (None if n is None else int(n) for n in numbers)
    format_ = found["format"].lower() if found["format"] else None
    if version is not None and format_ is None:
        return Civitai(version, file)
    return Civitai(version, file, model, format_)


def _file(text: str) -> LocalFile:
    rest = text[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in {"", "localhost"}:
            raise ValueError(f"`{_short(text)}` names a file of another machine, `{_short(host)}`")
        rest = slash + path
    path = unquote(rest)
    if not path.strip("/") or "\0" in path:
        raise ValueError(f"`{_short(text)}` names no file")
    return LocalFile(path)


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 100 else text[:99] + "…"

"""The addresses a recipe may have, and those of what lies beside it: https, hf and git+https."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from builder.base.addresses import HuggingFace, Web, parse_address, safe_path, split
from builder.base.errors import Problem, UsageError, clipped

LOCK = ".lock.toml"  # ends the name of a lock
FORMS = "`https://…/x.toml`, `hf://org/name[@revision]/x.toml` or `git+https://…#x.toml[@commit]`"
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # of one letter is a drive
_SCHEMES = frozenset({"https", "http", "hf", "git+https", "git+http"})
_GIT = re.compile(r"git\+(?P<url>https?://[^#]+)#(?P<path>[^@]+)(?:@(?P<revision>.+))?", re.IGNORECASE)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
_GITHUB = re.compile(r"https://github\.com(?P<repo>/[^/]+/[^/]+)/blob/(?P<revision>[^/]+)/(?P<path>[^?#]+)")


@dataclass(frozen=True, slots=True)
class Git:
    """A file of a Git repository, at a commit, a tag or a branch: by default the repository's own."""

    url: str
    path: str
    revision: str = "HEAD"

    def __str__(self) -> str:
        revision = "" if self.revision == "HEAD" else f"@{self.revision}"
        return f"git+{self.url}#{quote(self.path)}{revision}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which names the same file for ever."""
        return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", self.revision) is not None


RecipeAddress = Web | HuggingFace | Git


def is_address(text: str) -> bool:
    """Whether what names a recipe is meant as an address, good or not, and not as a path."""
    return _SCHEME.match(text) is not None


def parse_recipe_address(text: str) -> RecipeAddress:
    """The address of a recipe that `text` spells. Raises UsageError when it spells none."""
    if (page := _GITHUB.fullmatch(text)) is not None:
        repo, revision, path = page["repo"], page["revision"], page["path"]
        raise UsageError(
            Problem(
                f"`{clipped(text, 200)}` is a page, not a file",
                hint=f"the file is `git+https://github.com{repo}#{path}@{revision}`",
            )
        )
    scheme = text.partition("://")[0].lower()
    if scheme not in _SCHEMES:
        fact = f"`{clipped(scheme, 40)}://` begins no address of a recipe"
        raise UsageError(Problem(fact, hint=f"a recipe's address is {FORMS}"))
    address = _git(text) if scheme.startswith("git+") else parse_address(text)
    if not isinstance(address, RecipeAddress):
        raise _wrong(text, "there are no recipes at such an address")
    if not path_of(address).endswith(".toml"):
        raise _wrong(text, "a recipe's name ends in `.toml`")
    if path_of(address).endswith(LOCK):
        raise _wrong(text, "it is the name of a recipe's lock")
    return address


def _git(text: str) -> Git:
    found = _GIT.fullmatch(text) if text.isprintable() and len(text) <= 4096 else None
    if found is None:
        raise _wrong(text, "it is not of the form `git+https://…#path[@commit]`")
    try:
        url = split(found["url"])
    except ValueError as error:
        raise UsageError(Problem(str(error), hint=f"a recipe's address is {FORMS}")) from None
    path, revision = unquote(found["path"]), found["revision"] or "HEAD"
    if url.query:
        raise _wrong(text, "a repository's address has no `?`")
    if not safe_path(path):
        raise _wrong(text, "its path has an empty, `.` or `..` part, or what does not print")
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise _wrong(text, "what follows `@` is no commit, tag or branch")
    return Git(url.geturl(), path, revision)


def _wrong(text: str, why: str) -> UsageError:
    fact = f"`{clipped(text, 200)}` is not the address of a recipe: {why}"
    return UsageError(Problem(fact, hint=f"a recipe's address is {FORMS}"))


def path_of(address: RecipeAddress) -> str:
    """The path of the file, as names are written, from the root of its host or repository."""
    return unquote(urlsplit(address.url).path) if isinstance(address, Web) else address.path


def names_for_ever(address: RecipeAddress) -> bool:
    """Whether an address names the same file for ever, as one with a commit does."""
    return not isinstance(address, Web) and address.pinned


def beside(address: RecipeAddress, name: str) -> RecipeAddress:
    """The address of a file whose path is `name` from the folder that the one of `address` is in."""
    if not isinstance(address, Web):
        folder = address.path.rpartition("/")[0]
        return replace(address, path=f"{folder}/{name}" if folder else name)
    url = urlsplit(address.url)
    folder = url.path.rpartition("/")[0]
    return Web(urlunsplit(url._replace(path=f"{folder}/{quote(name)}")))

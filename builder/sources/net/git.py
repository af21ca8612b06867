"""Files of a Git repository at one commit, read by a `git` that no one else has settings for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from builder.base.recipe_address import Git
from builder.sources.net.client import Session, origin_of
from builder.sources.net.failure import Failure
from builder.sources.net.text import host_words

MAX_BYTES = 256 << 20  # bytes of a fetch, for hosts that cannot leave the contents of files out
MAX_SECONDS = 120.0
_MEMORY = 2 << 30  # bytes of addresses that a process of git's may have
_LOOK = 0.02  # seconds between two looks at a process

# What no repository and no setting of this machine is to change: no hooks, no helpers, no other protocol, no
# redirects (where they lead could not be checked), nothing fetched beside what is asked for.
_SETTINGS = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.bigFileThreshold": "1m",  # larger files are not taken into memory whole
    "credential.helper": "",
    "fetch.fsckObjects": "true",
    "fetch.recurseSubmodules": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "http.followRedirects": "false",
    "http.lowSpeedLimit": "1024",
    "http.lowSpeedTime": "30",
    "pack.threads": "1",
    "protocol.version": "2",
    "protocol.allow": "never",
    "transfer.bundleURI": "false",
}
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")


@dataclass(frozen=True)
class Repository:
    """A repository of which one commit was fetched: `address` names it by that commit, for ever.

    `permitted` are the IP addresses of its host that may be connected to; none: a proxy finds them.
    """

    address: Git
    folder: Path
    session: Session
    permitted: tuple[str, ...]

    def read(self, path: str, limit: int) -> bytes | None:
        """The bytes of the file at a path, None where there is none. Raises Failure, as for a link."""
        commit = self.address.revision
        listed = self.git("ls-tree", "-z", "--full-tree", commit, "--", path)
        entry = next((e for e in listed.decode("utf-8", "replace").split("\0") if e), "")
        about, _, name = entry.partition("\t")
        if name != path:
            return None
        mode, _, digest = about.split(" ")
        if mode not in {"100644", "100755"}:
            raise Failure(f"`{path}` is no file of the repository: a link, a folder or a module")
        return self.git("cat-file", "blob", digest, limit=limit)

    def git(self, *command: str, limit: int = 1 << 20) -> bytes:
        """What `git` prints, at most `limit` bytes of it. Raises Failure."""
        folder, session = self.folder, self.session
        settings = {**_SETTINGS, **self._host()}
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        out, err = folder / "out", folder / "err"
        try:
            with out.open("wb") as said, err.open("wb") as complained:
                process = subprocess.Popen(
                    ["git", *options, *command],
                    cwd=folder,
                    env=_environment(session.environ, folder),
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=complained,
                    start_new_session=True,
                )
        except FileNotFoundError:
            hint = "install it, or give the address of the file itself"
            raise Failure("the program `git` is not there", hint=hint) from None
        try:
            _bound(process.pid)
            until = time.monotonic() + MAX_SECONDS
            while (code := process.poll()) is None:
                session.wait(_LOOK)
                if time.monotonic() > until:
                    raise Failure(f"`git {command[0]}` takes more than {MAX_SECONDS:g} seconds")
                if _size(folder) > MAX_BYTES:
                    raise Failure(
                        f"more than {MAX_BYTES:,} bytes come for one commit: the host sends all files"
                    )
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError, AttributeError):  # not every system has groups
                    os.killpg(process.pid, signal.SIGKILL)  # with the programs that it runs
                process.kill()
                process.wait()
        if code:
            raise _failed(self.address, command[0], err)
        if out.stat().st_size > limit:
            raise Failure(f"the file has {out.stat().st_size:,} bytes, more than {limit:,}")
        return out.read_bytes()

    def _host(self) -> dict[str, str]:
        """Settings by which the host is asked, at the very IP addresses that were looked at, and no other."""
        origin = origin_of(self.address.url)
        allowed = {f"protocol.{origin.scheme}.allow": "always"}
        if not self.permitted or origin.host in self.permitted:
            return allowed
        found = [f"[{ip}]" if ":" in ip else ip for ip in self.permitted]
        return {**allowed, "http.curloptResolve": f"{origin.host}:{origin.port}:{','.join(found)}"}


def open_repository(address: Git, folder: Path, session: Session) -> Repository:
    """Fetch one commit of a repository into a new repository in `folder`; no file's contents come along.

    Nothing of it is checked out or run, and no setting of the user's or the machine's counts: what needs a
    login cannot be read. Raises Failure.
    """
    permitted = session.permitted(address.url)
    folder.mkdir(parents=True)
    repository = Repository(address, folder, session, tuple(permitted))
    repository.git("init", "--quiet", "--bare", "--template=", ".")
    repository.git("config", "remote.origin.url", address.url)
    fetch = ("fetch", "--quiet", "--depth=1", "--filter=blob:none", "--no-tags", "origin", address.revision)
    repository.git(*fetch)
    commit = repository.git("rev-parse", "--verify", "FETCH_HEAD^{commit}").decode("ascii", "replace").strip()
    if address.pinned and commit != address.revision:
        raise Failure("the host gives another commit", mismatch=True, evidence=(f"received: {commit}",))
    return replace(repository, address=replace(address, revision=commit))


def _environment(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """All that git hears of: where programs are, the proxies, and the certificates to trust."""
    own = {
        "PATH": environ.get("PATH", os.defpath),
        "HOME": str(folder),  # no `.netrc`, no settings
        "LC_ALL": "C",
        "GIT_DIR": ".",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_LITERAL_PATHSPECS": "1",
    }
    told = {name: environ[name] for name in _PROXIES if environ.get(name)}
    for ours, gits in (("SSL_CERT_FILE", "GIT_SSL_CAINFO"), ("SSL_CERT_DIR", "GIT_SSL_CAPATH")):
        if environ.get(ours):
            told[gits] = environ[ours]
    return {**own, **told}


def _bound(pid: int) -> None:
    """Bound the memory and the files of a process, where the system can."""
    with suppress(ImportError, AttributeError, OSError):
        import resource

        resource.prlimit(pid, resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (MAX_BYTES, MAX_BYTES))


def _size(folder: Path) -> int:
    """The bytes of all files below a folder in which others are at work."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(f"{root}/{name}").st_size
    return total


_MEANING = {
    "terminal prompts disabled": "it is not there, or needs a login",
    "could not read Username": "it is not there, or needs a login",
    "couldn't find remote ref": "it has no such commit, tag or branch",
    "not our ref": "it has no such commit",
    "returned error: 30": "it has moved elsewhere",
    "dumb http": "its host only serves files, and cannot give one commit",
}


def _failed(address: Git, command: str, err: Path) -> Failure:
    """Why git gave up, in words of ours and in its own."""
    with err.open("rb") as file:
        said = file.read(64 << 10)
    meaning = next((ours for its, ours in _MEANING.items() if its.encode() in said), f"`git {command}` fails")
    lines = [line for line in said.split(b"\n") if line.startswith((b"fatal:", b"error:", b"remote:"))]
    words = host_words({}, lines[-1] if lines else said[-500:])
    hint = None
    if "commit" in meaning and not address.pinned:
        hint = "a commit is named by all of its 40 digits"
    elif "moved" in meaning:
        hint = "name the repository where it is now; often that only ends in `.git`"
    return Failure(meaning, hint=hint, evidence=(f"git: {words}",) if words else ())

"""Where a shared store lies: a folder, an object store, or a server that speaks bazel-remote's HTTP."""

from __future__ import annotations

import base64
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from builder.base.addresses import split
from builder.base.disk import replacing, write_all
from builder.base.errors import OutputError, Problem, SourceError, UsageError
from builder.formats.blob import FileBlob
from builder.sources.net.client import Response, Session
from builder.sources.net.failure import Failure
from builder.sources.net.text import scrub
from builder.sources.net.wire import Limits
from builder.store.shared import Absent, Bucket, Unavailable

TOKEN = "CKPT_SHARED_TOKEN"
FORMS = "s3://BUCKET/PREFIX, gs://…, az://…, http(s)://HOST of bazel-remote, or a folder"

# A build waits for what it could make itself: no longer than that makes sense.
LIMITS = Limits(connect=5, headers=10, read=10, slowest=1 << 20, patience=15)

_OBJECTS = frozenset({"s3", "s3a", "gs", "az", "azure"})
_PIECE = 1 << 20  # bytes that are read of a file at a time
_RANGE = 16 << 20  # bytes asked of an object store at a time
_MISSING = frozenset({404, 410})


def bucket_of(
    url: str, environment: Mapping[str, str], *, limits: Limits = LIMITS
) -> tuple[bool, Callable[[], Bucket]]:
    """Whether a shared store is reached by the network, and what connects to it.

    Raises UsageError for what is no address of one.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        folder = Path(rest if separator else url).expanduser()
        if not folder.is_absolute():
            hint = f"`{folder.absolute()}` is one"
            raise UsageError(Problem(f"a shared store has a whole path, not `{url}`", hint=hint))
        return False, lambda: Folder(folder)
    if scheme in ("http", "https"):
        try:
            split(url)
        except ValueError as error:
            raise UsageError(
                Problem(str(error), hint=f"`{TOKEN}` holds `USER:PASSWORD` or a token")
            ) from None
        return True, lambda: BazelRemote(url.rstrip("/"), environment, limits)
    if scheme in _OBJECTS:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", rest.partition("/")[0]):
            raise UsageError(Problem(f"`{scheme}://` is followed by a bucket's name alone, and a prefix"))
        if find_spec("obstore") is None:
            fact = f"`{scheme}://` needs the package obstore"
            raise UsageError(Problem(fact, hint="`pip install 'ckpt-build[remote]'`"))
        return True, lambda: Objects(url, environment, limits)
    raise UsageError(Problem(f"`{scheme}://` is no shared store", hint=f"one of {FORMS}"))


class Folder:
    """A folder, as on a network file system; what is written appears whole."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, name: str, most: int) -> Iterator[bytes]:
        """The bytes of a file; no link is followed, and a pipe is none."""
        path = self.root / name
        if not os.path.lexists(path):
            raise Absent
        try:
            if path.is_symlink():
                raise Unavailable(f"`{path}` is a link")
            with closing(FileBlob(path)) as blob:
                for at in range(0, min(blob.size, most + 1), _PIECE):
                    yield blob.read(at, min(_PIECE, blob.size - at))
        except SourceError as error:
            raise Unavailable(error.problems[0].fact) from None
        except OSError as error:
            raise Unavailable(str(error.strerror)) from None

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        path = self.root / name
        return path.is_file() and not path.is_symlink()

    def put(self, name: str, data: bytes | Path) -> None:
        """Write a file."""
        path = self.root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _opened(data) as (file, _), replacing(path, durable=False) as fd:
                at = 0
                while piece := file.read(_PIECE):
                    write_all(fd, piece, at)
                    at += len(piece)
        except OutputError as error:
            raise Unavailable("; ".join((error.problems[0].fact, *error.problems[0].evidence))) from None
        except OSError as error:
            raise Unavailable(str(error.strerror)) from None

    def close(self) -> None:
        """There is nothing to let go of."""


class BazelRemote:
    """A server that keeps what is PUT under `/ac/` and `/cas/`, as bazel-remote does.

    It may be of one's own network, and without encryption there. What `CKPT_SHARED_TOKEN` holds goes to no
    other host.
    """

    def __init__(self, url: str, environment: Mapping[str, str], limits: Limits) -> None:
        self._url = url
        self._session = Session({**environment, "CKPT_ALLOW_PRIVATE": "1"}, limits=limits)
        self._secret = environment.get(TOKEN, "").strip()
        self._headers = {"Authorization": _authorization(self._secret)} if self._secret else {}
        self._limits = limits

    def get(self, name: str, most: int) -> Iterator[bytes]:
        """The body of an answer."""
        with self._asked("GET", name) as response:
            if response.status in _MISSING:
                raise Absent
            if response.status != 200:
                raise response.failure()
            got = 0
            while got <= most and (piece := response.read()):
                yield piece
                got += len(piece)

    def has(self, name: str) -> bool:
        """What HEAD says."""
        with self._asked("HEAD", name) as response:
            if response.status not in {200, *_MISSING}:
                raise response.failure()
            return response.status == 200

    def put(self, name: str, data: bytes | Path) -> None:
        """PUT, with the size said before: bazel-remote takes nothing else."""
        with _opened(data) as (file, size):

            def body() -> _Paced:
                file.seek(0)
                return _Paced(file, self._limits)

            with self._asked("PUT", name, {"Content-Length": str(size)}, body=body) as response:
                if response.status not in {200, 201, 204}:
                    raise response.failure()

    def close(self) -> None:
        """Close idle connections."""
        self._session.close()

    @contextmanager
    def _asked(
        self, method: str, name: str, headers: Mapping[str, str] | None = None, **more: Any
    ) -> Iterator[Response]:
        try:
            url = f"{self._url}/{name}"
            response = self._session.request(
                method, url, {**self._headers, **(headers or {})}, across=False, **more
            )
            try:
                yield response
                response.explanation()
            finally:
                response.close()
        except Failure as error:
            raise Unavailable(scrub(error.fact, [self._secret] if self._secret else [])) from None


class Objects:
    """An object store, through obstore: S3 and what is like it, Google's, Azure's.

    Credentials, region and endpoint come from the environment or the machine, as of the vendors' own tools.
    """

    def __init__(self, url: str, environment: Mapping[str, str], limits: Limits) -> None:
        import obstore
        import obstore.exceptions
        from obstore.store import from_url

        self._obstore = obstore
        self._missing = (obstore.exceptions.NotFoundError, FileNotFoundError)
        plain = (f"{vendor}_ALLOW_HTTP" for vendor in ("AWS", "GOOGLE", "AZURE"))
        try:
            self._store = from_url(
                url,
                client_options={
                    "allow_http": any(environment.get(v, "").lower() in ("true", "1") for v in plain),
                    "connect_timeout": timedelta(seconds=limits.connect),
                    "timeout": timedelta(seconds=limits.patience + _RANGE / limits.slowest),
                },
                retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=limits.patience)},
            )
        except Exception as error:
            raise _unavailable(error) from None

    def get(self, name: str, most: int) -> Iterator[bytes]:
        """An object, a range after the other: each has its time."""
        at = 0
        while at < most:
            asked = min(_RANGE, most - at)
            try:
                piece = bytes(self._obstore.get_range(self._store, name, start=at, length=asked))
            except self._missing:
                raise Absent from None
            except Exception as error:
                raise _unavailable(error) from None
            yield piece
            at += len(piece)
            if len(piece) < asked:
                return

    def has(self, name: str) -> bool:
        """Whether there is such an object."""
        try:
            self._obstore.head(self._store, name)
        except self._missing:
            return False
        except Exception as error:
            raise _unavailable(error) from None
        return True

    def put(self, name: str, data: bytes | Path) -> None:
        """Put an object, a large one in parts."""
        try:
            self._obstore.put(self._store, name, data, chunk_size=_RANGE, max_concurrency=2)
        except Exception as error:
            raise _unavailable(error) from None

    def close(self) -> None:
        """The library lets go by itself."""


def _unavailable(error: Exception) -> Unavailable:
    """What obstore says of a failure: its first line, which is the fact."""
    return Unavailable((str(error).strip().splitlines() or [type(error).__name__])[0])


def _authorization(secret: str) -> str:
    if not secret.isascii() or not secret.isprintable():
        raise Unavailable(f"`{TOKEN}` holds characters that no token has")
    if ":" in secret:
        return f"Basic {base64.b64encode(secret.encode()).decode('ascii')}"
    return f"Bearer {secret}"


@contextmanager
def _opened(data: bytes | Path) -> Iterator[tuple[io.BufferedIOBase, int]]:
    """Bytes, or those of a file, to be read, and how many they are."""
    if isinstance(data, bytes):
        yield io.BytesIO(data), len(data)
        return
    with data.open("rb") as file:
        yield file, os.fstat(file.fileno()).st_size


class _Paced:
    """A body that is taken no slower than answers may come."""

    def __init__(self, file: io.BufferedIOBase, limits: Limits) -> None:
        self._file, self._limits = file, limits
        self._began, self._taken = time.monotonic(), 0

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes; raises Failure once they are taken too slowly."""
        waited = time.monotonic() - self._began
        if waited >= self._limits.patience and self._taken < self._limits.slowest * waited:
            raise Failure("what is sent is taken too slowly", retry=True)
        piece = self._file.read(size)
        self._taken += len(piece)
        return piece

"""HTTP servers on loopback that behave as hosts of models do, and that misbehave as they do."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

BLOCK = 1 << 16


class Handler(BaseHTTPRequestHandler):
    """One request, handed to the route of its path; what goes out is counted."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def do_GET(self) -> None:
        owner = self.server.owner
        path = unquote(urlsplit(self.path).path)
        owner.log(Seen(self.command, self.path, dict(self.headers.items()), self.client_address[1]))
        route = owner.routes.get(path) or next(
            (r for p, r in owner.prefixes.items() if path.startswith(p)), None
        )
        if route is None:
            answer(self, 404, b"not here", {"Content-Type": "text/plain"})
        else:
            route(self)

    do_HEAD = do_POST = do_PUT = do_GET

    def do_CONNECT(self) -> None:
        self.server.owner.connect(self)

    def send(self, data: bytes | memoryview) -> None:
        """Body bytes; none for a HEAD request."""
        if self.command != "HEAD":
            self.server.owner.count(len(data))  # first: who has read it all may ask at once
            try:
                self.wfile.write(data)
            except OSError:
                self.server.owner.count(-len(data))
                raise

    def cut(self) -> None:
        """Drop the connection, as a network does."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass


Route = Callable[[Handler], None]


@dataclass(frozen=True)
class Seen:
    """A request as it came in; `port` tells connections apart."""

    method: str
    path: str
    headers: dict[str, str]
    port: int


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    owner: Server

    def handle_error(self, *_: object) -> None:
        pass  # clients that go away are part of the game


class _Http6(_Http):
    address_family = socket.AF_INET6


class Server:
    """A server on a port of its own, for as long as the `with` lasts."""

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.routes: dict[str, Route] = {}
        self.prefixes: dict[str, Route] = {}
        self.connect: Route = lambda handler: answer(handler, 405)  # what it does as a proxy
        self.seen: list[Seen] = []
        self.sent = 0
        self._lock = threading.Lock()
        self._http = (_Http6 if ":" in host else _Http)((host, 0), Handler)
        self._http.owner = self
        if tls is not None:
            self._http.socket = tls.wrap_socket(
                self._http.socket, server_side=True, do_handshake_on_connect=False
            )
        self.scheme = "https" if tls else "http"
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def url(self, path: str = "", host: str = "127.0.0.1") -> str:
        """The address of a path, by the name of this machine that is asked for."""
        return f"{self.scheme}://{host}:{self.port}{path}"

    def log(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    def count(self, sent: int) -> None:
        with self._lock:
            self.sent += sent

    def asked(self, path: str) -> list[Seen]:
        """The requests for a path."""
        return [s for s in self.seen if unquote(urlsplit(s.path).path) == path]


def answer(handler: Handler, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
    """A whole answer."""
    handler.send_response(status)
    for key, value in (headers or {}).items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.send(body)


def says(status: int, body: bytes | str = b"", **headers: str) -> Route:
    """The same answer every time; `_` in names of headers stands for `-`."""
    data = body.encode() if isinstance(body, str) else body
    return lambda handler: answer(handler, status, data, {k.replace("_", "-"): v for k, v in headers.items()})


def redirects(to: str, status: int = 302, **headers: str) -> Route:
    """A redirect."""
    return says(status, b"elsewhere", Location=to, **headers)


def in_turn(*routes: Route) -> Route:
    """One route after the other; the last one stays."""
    lock, left = threading.Lock(), list(routes)

    def route(handler: Handler) -> None:
        with lock:
            chosen = left.pop(0) if len(left) > 1 else left[0]
        chosen(handler)

    return route


@dataclass
class File:
    """A file as storage serves it: ranges, If-Range, a strong ETag. The fields are ways to misbehave.

    `drops`: bodies are cut after so many bytes, one after the other. `shift`: parts begin so many bytes
    late. `etags`: the ETag of one answer after the other.
    """

    data: bytes
    etag: str | None = None
    ranges: bool = True
    length: bool = True
    chunked: bool = False
    encoding: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drops: list[int] = field(default_factory=list)
    shift: int = 0
    etags: list[str] = field(default_factory=list)
    pause: float = 0.0
    block: int = BLOCK

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        if self.etag is None:
            self.etag = f'"{hashlib.md5(self.data).hexdigest()}"'

    def __call__(self, handler: Handler) -> None:
        with self._lock:
            drop = self.drops.pop(0) if self.drops else None
            etag = self.etags.pop(0) if self.etags else self.etag
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
        current = handler.headers.get("If-Range") in {None, etag}
        start, end = 0, len(self.data)
        partial = bool(self.ranges and wanted and current)
        if partial and wanted is not None:
            start = int(wanted[1])
            end = min(int(wanted[2]) + 1 if wanted[2] else end, end)
            if start >= len(self.data):
                answer(handler, 416, b"", {"Content-Range": f"bytes */{len(self.data)}"})
                return
            start, end = start + self.shift, min(end + self.shift, len(self.data))
        handler.send_response(206 if partial else 200)
        if etag:
            handler.send_header("ETag", etag)
        if self.ranges:
            handler.send_header("Accept-Ranges", "bytes")
        if partial:
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.data)}")
        if self.encoding:
            handler.send_header("Content-Encoding", self.encoding)
        for key, value in self.headers.items():
            handler.send_header(key, value)
        if self.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        elif self.length:
            handler.send_header("Content-Length", str(end - start))
        else:
            handler.send_header("Connection", "close")
            handler.close_connection = True
        handler.end_headers()
        self._body(handler, start, end, drop)

    def _body(self, handler: Handler, start: int, end: int, drop: int | None) -> None:
        stop = end if drop is None else min(end, start + drop)
        for at in range(start, stop, self.block):
            piece = self.data[at : min(at + self.block, stop)]
            handler.send(b"%x\r\n%s\r\n" % (len(piece), piece) if self.chunked else piece)
            if self.pause:
                handler.wfile.flush()
                time.sleep(self.pause)
        if stop < end:
            handler.cut()
        elif self.chunked:
            handler.send(b"0\r\n\r\n")


def endless(handler: Handler) -> None:
    """A body without length that never ends."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:
        handler.send(b"10000\r\n" + bytes(BLOCK) + b"\r\n")


def dribble(handler: Handler) -> None:
    """A body of which a byte comes now and then."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while True:
        handler.send(b"x")
        handler.wfile.flush()
        time.sleep(0.02)


def silent(handler: Handler) -> None:
    """Headers, and then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.wfile.flush()
    time.sleep(3.0)


def garbage(handler: Handler) -> None:
    """What is no HTTP."""
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    handler.cut()


def sends(data: bytes) -> Route:
    """These bytes, whatever they are, and then the connection is dropped."""

    def route(handler: Handler) -> None:
        handler.wfile.write(data)
        handler.cut()

    return route


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hugging_face(
    hub: Server,
    storage: Server,
    repo: str,
    path: str,
    data: bytes,
    *,
    token: str | None = None,
    lfs: bool = True,
    commit: str = COMMIT,
) -> File:
    """Put a file on a server as the Hugging Face hub has it: described by the hub, kept in a storage.

    With `token`, the repository is gated. The storage refuses requests that carry an Authorization.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    kept = File(data, etag=f'"{hashlib.md5(data).hexdigest()}"')
    place = f"/repos/{sha256}"

    def stored(handler: Handler) -> None:
        if handler.headers.get("Authorization"):
            answer(handler, 400, b"<Error><Message>Only one auth mechanism allowed</Message></Error>")
        else:
            kept(handler)

    def described(handler: Handler) -> None:
        if token is not None and handler.headers.get("Authorization") != f"Bearer {token}":
            headers = {
                "X-Error-Code": "GatedRepo",
                "X-Error-Message": f"Access to model {repo} is restricted.",
            }
            answer(handler, 401, b"Access to model is restricted.", headers)
            return
        about = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not lfs:
            about["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            File(data, etag=about["ETag"], headers=about)(handler)
            return
        about |= {"x-linked-etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        about["Location"] = storage.url(f"{place}?X-Amz-Signature=secret-signature", host="localhost")
        answer(handler, 302, b"Found. Redirecting", about)

    for revision in ("main", commit):
        hub.routes[f"/{repo}/resolve/{revision}/{path}"] = described
    storage.routes[place] = stored
    return kept


def civitai(
    site: Server,
    storage: Server,
    version: int,
    file: int,
    data: bytes,
    *,
    token: str | None = None,
    others: list[dict[str, Any]] | None = None,
    model: int = 7,
) -> File:
    """Put a file on a server as Civitai has it: an API, and downloads that redirect to a storage."""
    sha256 = hashlib.sha256(data).hexdigest()
    kept = File(data, headers={"content-disposition": 'attachment; filename="../model v1.safetensors"'})
    entry = {
        "id": file,
        "name": "model v1.safetensors",
        "type": "Model",
        "sizeKB": len(data) / 1024,
        "metadata": {"format": "SafeTensor", "size": "pruned", "fp": "fp16"},
        "hashes": {"AutoV2": sha256[:10].upper(), "SHA256": sha256.upper()},
        "primary": True,
    }
    about = {"id": version, "modelId": model, "name": "v1", "files": [*(others or []), entry]}
    said = says(200, json.dumps(about), Content_Type="application/json")

    def download(handler: Handler) -> None:
        if token is not None and handler.headers.get("Authorization") != f"Bearer {token}":
            body = (
                b'{"error":"Unauthorized","message":"The creator of this asset requires you to be logged in"}'
            )
            answer(handler, 401, body, {"Content-Type": "application/json"})
        else:
            answer(
                handler, 307, b"", {"Location": storage.url(f"/bucket/{sha256}?Signature=secret-signature")}
            )

    def stored(handler: Handler) -> None:
        if handler.headers.get("Authorization"):
            answer(handler, 400, b"<Error><Message>Only one auth mechanism allowed</Message></Error>")
        else:
            kept(handler)

    site.routes[f"/api/v1/model-versions/{version}"] = said
    site.routes[f"/api/v1/model-versions/by-hash/{sha256.upper()}"] = said
    site.routes[f"/api/v1/models/{model}"] = says(200, json.dumps({"id": model, "modelVersions": [about]}))
    site.routes[f"/api/download/models/{version}"] = download
    storage.routes[f"/bucket/{sha256}"] = stored
    return kept


def git_host(site: Server, path: str, repository: Path, **settings: str) -> None:
    """Serve a repository below a path, by git's own program for hosts; `_` in settings stands for `.`."""
    backend = Path(subprocess.check_output(["git", "--exec-path"], text=True).strip()) / "git-http-backend"
    told = {"uploadpack.allowFilter": "true", **{k.replace("_", "."): v for k, v in settings.items()}}

    def route(handler: Handler) -> None:
        url = urlsplit(handler.path)
        length = int(handler.headers.get("Content-Length") or 0)
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(repository),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_COUNT": str(len(told)),
            **{f"GIT_CONFIG_KEY_{i}": key for i, key in enumerate(told)},
            **{f"GIT_CONFIG_VALUE_{i}": value for i, value in enumerate(told.values())},
            "GIT_PROTOCOL": handler.headers.get("Git-Protocol") or "",
            "REQUEST_METHOD": handler.command,
            "PATH_INFO": unquote(url.path).removeprefix(path),
            "QUERY_STRING": url.query,
            "CONTENT_TYPE": handler.headers.get("Content-Type") or "",
            "CONTENT_LENGTH": str(length),
            "HTTP_CONTENT_ENCODING": handler.headers.get("Content-Encoding") or "",
        }
        done = subprocess.run(
            [backend], input=handler.rfile.read(length), env=environment, capture_output=True, check=False
        )
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if line)
        answer(handler, int(headers.pop("Status", "200")[:3]), body, headers)

    site.prefixes[path] = route


def certificate(folder: Path, names: str = "DNS:localhost") -> Path:
    """A self-signed certificate and its key in one file, made by the `openssl` program."""
    made = folder / "server.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", f"subjectAltName={names}"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


def tls_server_context(folder: Path) -> ssl.SSLContext:
    """What a server with the certificate in `folder` needs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "key.pem")
    return context


def drips(head: bytes, then: bytes = b"", pause: float = 0.02) -> Route:
    """An answer of which `head` comes a byte now and then, and `then` over and over, as slowly."""

    def route(handler: Handler) -> None:
        for byte in itertools.chain(head, itertools.cycle(then)):
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(pause)

    return route


def floods(head: bytes, then: bytes) -> Route:
    """An answer that begins with `head` and goes on with `then` as fast as it is taken."""

    def route(handler: Handler) -> None:
        handler.wfile.write(head)
        while True:
            handler.wfile.write(then * (1 + BLOCK // len(then)))

    return route

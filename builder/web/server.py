"""The server: every request is checked, bounded in size and time, and answered once."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from builder.base.errors import CkptError, Problem
from builder.web import pages
from builder.web.html import Markup
from builder.web.jobs import Job
from builder.web.routes import API, PAGES, POSTS
from builder.web.session import TOKEN, Session, refused
from builder.web.site import Form, Response, Site

HOST = "127.0.0.1"
MAX_BODY = 2 << 20  # bytes of a form: a recipe and its fields
MAX_FIELDS = 500
MOST_CONNECTIONS = 64
PATIENCE = 20.0  # seconds for a request to arrive, and for each piece of an answer to leave
BEAT = 10.0  # seconds after which a stream says that it is still there
EVERY = 0.2  # seconds between events of a stream

STATIC = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not `no-referrer`: with that, browsers send forms with `Origin: null`, and it could not be checked.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """Serves a site on 127.0.0.1; a port of 0 is any that is free. `fault` hears of our own mistakes."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, site: Site, port: int, fault: Callable[[BaseException], object]) -> None:
        self.site = site
        self.session = Session()
        self.fault = fault
        self.closing = threading.Event()
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((HOST, port), Handler)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    @property
    def address(self) -> str:
        """The address to open, with the token."""
        return self._with(self.session.token)

    @property
    def address_once(self) -> str:
        """The same, with the ticket."""
        return self._with(self.session.ticket)

    def _with(self, token: str) -> str:
        return f"http://{HOST}:{self.port}{self.session.path}?{TOKEN}={token}"

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # that of HTTPServer asks the network for the host's name
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left, or was too slow, is no fault of ours."""

    def server_close(self) -> None:
        self.closing.set()
        super().server_close()


class _Arriving(io.RawIOBase):
    """What a client sends, all of it within a time: one that sends a byte now and then is not waited for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until = time.monotonic() + PATIENCE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(PATIENCE)


class Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    server: Server
    timeout = PATIENCE
    protocol_version = "HTTP/1.1"
    server_version = "ckpt"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Arriving(self.connection))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what is asked for is nobody's business."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library has to say of a request that is none."""
        status = HTTPStatus(code)
        self._send(Response(pages.refusal(status.phrase, message or ""), int(status)))

    # -- what is answered

    def _answer(self, how: Callable[[str, Form], Response | Markup]) -> None:
        self.close_connection = True
        try:
            address = urlsplit(self.path)
            query = Form(parse_qs(address.query, keep_blank_values=True, max_num_fields=MAX_FIELDS))
        except ValueError:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        headers = {name.title(): value for name, value in self.headers.items()}
        if (why := refused(self.command, headers, self.server.port)) is not None:
            self.send_error(HTTPStatus.FORBIDDEN, why)
            return
        if not address.path.startswith(self.server.session.path):
            self.send_error(HTTPStatus.NOT_FOUND, "open the address that the terminal shows")
            return
        name = address.path[len(self.server.session.path) :]
        if name == "" and self.command == "GET" and self.server.session.opens(query.get(TOKEN)):
            cookie = {"Set-Cookie": self.server.session.cookie}
            self._send(Response(status=303, headers={"Location": self.server.session.path, **cookie}))
            return
        if not self.server.session.knows(self.headers.get("Cookie", "")):
            self.send_error(HTTPStatus.FORBIDDEN, "open the address that the terminal shows")
            return
        if name == "events" and self.command == "GET":
            self._stream(query)
            return
        self._send(self._made(name, query, how))

    def _made(self, name: str, query: Form, how: Callable[[str, Form], Response | Markup]) -> Response:
        """The answer, whatever happens."""
        in_json = name.startswith("api/")
        try:
            found = how(name, query)
            return found if isinstance(found, Response) else Response(found)
        except CkptError as error:
            return pages.failure(error.problems, 422, int(error.exit_code), in_json=in_json)
        except OSError as error:
            problem = Problem((error.strerror or str(error)).lower())
            return pages.failure((problem,), 500, in_json=in_json)
        except Exception as error:
            self.server.fault(error)
            hint = "report it with the lines in the terminal"
            problem = Problem("this is a mistake in ckpt itself", hint=hint)
            return pages.failure((problem,), 500, 70, in_json=in_json)

    def _get(self, name: str, query: Form) -> Response | Markup:
        site, (room, _, below) = self.server.site, name.partition("/")
        if room == "static" and below in STATIC:
            return Response((files("builder.web") / "static" / below).read_bytes(), kind=STATIC[below])
        if room == "api" and below in API:
            return Response(json.dumps(API[below](site, query), indent=2), kind="application/json")
        return PAGES[name](site, query) if name in PAGES else _absent(name)

    def _post(self, name: str, query: Form) -> Response | Markup:
        if name not in POSTS:
            return _absent(name)
        body = self._body()
        return body if isinstance(body, Response) else POSTS[name](self.server.site, body)

    def _body(self) -> Form | Response:
        """The fields that were sent, or why they are not taken."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/x-www-form-urlencoded":
            return pages.failure((Problem("this is no form"),), HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            return pages.failure(
                (Problem("the form does not say how long it is"),), HTTPStatus.LENGTH_REQUIRED
            )
        if len(length) > 9 or int(length) > MAX_BODY:
            fact = f"the form has more than {MAX_BODY:,} bytes"
            return pages.failure((Problem(fact),), HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        raw = self.rfile.read(int(length))
        try:
            text = raw.decode("ascii")
            fields = parse_qs(
                text, True, strict_parsing=bool(text), max_num_fields=MAX_FIELDS, errors="strict"
            )
        except ValueError:
            return pages.failure((Problem("the form cannot be read"),), HTTPStatus.BAD_REQUEST)
        return Form(fields)

    # -- how it is sent

    def _send(self, response: Response) -> None:
        body = response.body.encode() if isinstance(response.body, str) else response.body
        self.close_connection = True
        self.send_response(response.status)
        self._head({"Content-Type": response.kind, "Content-Length": str(len(body)), **response.headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, headers: dict[str, str]) -> None:
        for key, value in {**HEADERS, "Connection": "close", **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def _stream(self, query: Form) -> None:
        """Server-sent events: how far a job is, until it is over."""
        number = query.get("job")
        job = self.server.site.jobs.get(int(number)) if number.isascii() and number.isdigit() else None
        if job is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(200)
        self._head({"Content-Type": "text/event-stream"})
        seen = -1
        while not self.server.closing.is_set():
            with job.changed:
                job.changed.wait_for(lambda: job.version != seen, BEAT)  # noqa: B023
                told, seen = job.version != seen, job.version
            if not told:
                self.wfile.write(b": still there\n\n")
                continue
            self.wfile.write(_event("over" if job.over else "progress", job))
            if job.over:
                return
            time.sleep(EVERY)


def _absent(name: str) -> Response:
    return pages.failure((Problem(f"there is no page `{name}`", hint="go back to the library"),), 404)


def _event(name: str, job: Job) -> bytes:
    said = job.to_json()
    data = {key: said[key] for key in ("state", "tasks")}
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()

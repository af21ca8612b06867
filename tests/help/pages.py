"""The page, served from a folder of the tests, and a client that does what a browser does."""

from __future__ import annotations

import html
import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from builder.web.folders import Folders
from builder.web.server import HOST, Server
from builder.web.site import Site
from builder.workspace import Settings
from tests.help.building import Folder


class Answer(NamedTuple):
    """A status, headers and a body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as it is."""
        return self.body.decode()

    @property
    def read(self) -> str:
        """What a person reads of a page: without tags, and with what was escaped as it is."""
        return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", self.text)))

    @property
    def json(self) -> Any:
        """The object in the body."""
        return json.loads(self.body)


@dataclass
class Client:
    """A client with the cookie of a server; headers are what a browser sends, unless others are given."""

    server: Server
    faults: list[BaseException] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return f"http://{HOST}:{self.server.port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str | None] | None = None
    ) -> Answer:
        """One request; a header of None is not sent."""
        said: dict[str, str | None] = {
            "Host": f"{HOST}:{self.server.port}",
            "Cookie": f"ckpt={self.server.session.token}",
            "Sec-Fetch-Site": "same-origin",
        }
        if method == "POST":
            said |= {"Origin": self.origin, "Content-Type": "application/x-www-form-urlencoded"}
        said |= headers or {}
        connection = http.client.HTTPConnection(HOST, self.server.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for key, value in said.items():
                if value is not None:
                    connection.putheader(key, value)
            if body is not None and "Content-Length" not in said:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.headers), answer.read())
        finally:
            connection.close()

    def get(self, view: str, **fields: str) -> Answer:
        """A view."""
        query = f"?{urlencode(fields)}" if fields else ""
        return self.ask("GET", f"{self.server.session.path}{view}{query}")

    def post(
        self, view: str, headers: dict[str, str | None] | None = None, **fields: str | list[str]
    ) -> Answer:
        """Send a form."""
        body = urlencode(fields, doseq=True).encode()
        return self.ask("POST", f"{self.server.session.path}{view}", body, headers)

    def job(self, view: str, **fields: str | list[str]) -> tuple[dict[str, Any], Answer]:
        """Send a form that starts work, and wait for it: the object and the page."""
        sent = self.post(view, **fields)
        assert sent.status == 303, sent.read
        number = sent.headers["Location"].partition("id=")[2]
        deadline = time.monotonic() + 120
        while (found := self.get("api/job", id=number).json)["code"] is None:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found, self.get("job", id=number)


@contextmanager
def served(folder: Folder, *more: Path) -> Iterator[Client]:
    """A server for a folder, and a client of it; what it takes for its own mistake fails the test."""
    faults: list[BaseException] = []
    settings = Settings.from_environment(folder.variables)
    site = Site(Folders([folder.path, *more]), settings, faults.append)
    server = Server(site, 0, faults.append)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Client(server, faults)
    finally:
        server.shutdown()
        server.server_close()
        site.close()
        thread.join()
    assert not faults, faults

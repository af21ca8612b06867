"""A server that keeps actions and blobs as bazel-remote does, and that misbehaves when it is asked to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from tests.help.servers import Handler, Route, Server, answer

WORKER = bytes.fromhex("4a0a0a0831302e302e302e31")  # `execution_metadata`, which the server adds to a result


@dataclass
class BazelRemote:
    """What is PUT below `/ac/` and `/cas/`, given back.

    A blob is compared with its name. A result of an action is kept with the name of who sent it, and given
    only while there are the files that it names. `token` is what requests carry. `lies` changes what is
    given, `instead` answers in its place; both by kind, `ac` or `cas`.
    """

    server: Server
    token: str | None = None
    lies: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    instead: dict[str, Route] = field(default_factory=dict)
    held: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server.prefixes["/"] = self

    @property
    def url(self) -> str:
        return self.server.url()

    def asked(self, method: str, kind: str = "") -> int:
        """How many requests there were."""
        return sum(s.method == method and s.path.startswith(f"/{kind}") for s in self.server.seen)

    def __call__(self, handler: Handler) -> None:
        found = re.fullmatch(r"/(?:.*/)?(ac|cas)/([0-9a-f]{64})", unquote(urlsplit(handler.path).path))
        size = int(handler.headers.get("Content-Length", "-1"))
        body = handler.rfile.read(max(size, 0)) if handler.command == "PUT" else b""
        if self.token is not None and handler.headers.get("Authorization") != f"Bearer {self.token}":
            return answer(handler, 401, b"Unauthorized")
        if found is None or (handler.command == "PUT" and size < 0):
            return answer(handler, 400, b"resource name must be a SHA256 hash in hex")
        kind, name = found.groups()
        if kind in self.instead:
            return self.instead[kind](handler)
        if handler.command == "PUT":
            if kind == "cas" and hashlib.sha256(body).hexdigest() != name:
                return answer(handler, 400, b"checksums don't match")
            self.held[kind, name] = body + WORKER * (kind == "ac")
            return answer(handler, 200)
        held = self.held.get((kind, name))
        if held is None or (kind == "ac" and not all(("cas", n) in self.held for n in _files(held))):
            return answer(handler, 404, b"Not found")
        return answer(handler, 200, self.lies.get(kind, bytes)(held))


def _files(result: bytes) -> list[str]:
    """The digests of the files that a result of an action names: fields 2, 2 and 1 of one another."""
    return [found.decode() for found in re.findall(rb"\x12.\x0a\x40([0-9a-f]{64})\x10", result)]

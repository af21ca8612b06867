"""Who may ask: the browser that was given the address, and pages of this server alone."""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie

COOKIE = "ckpt"
TOKEN = "token"


class Session:
    """The secrets of one run: `path` begins every address, `token` is in the first and then in a cookie.

    `ticket` stands for the token once: what starts a browser is in the list of processes, for all to see.

    A browser sends cookies of 127.0.0.1 to every port there; by their path they go to none but ours.
    """

    def __init__(self) -> None:
        self.path = f"/{secrets.token_urlsafe(9)}/"
        self.token = secrets.token_urlsafe(32)
        self.ticket = secrets.token_urlsafe(32)
        self._guard = threading.Lock()

    @property
    def cookie(self) -> str:
        """The header that sets the cookie, which no script and no other site's page gets to use."""
        return f"{COOKIE}={self.token}; Path={self.path}; HttpOnly; SameSite=Strict"

    def opens(self, token: str) -> bool:
        """Whether this is the token, or the ticket for the first time."""
        if _same(token, self.token):
            return True
        with self._guard:
            taken = bool(self.ticket) and _same(token, self.ticket)
            self.ticket = "" if taken else self.ticket
        return taken

    def knows(self, cookies: str) -> bool:
        """Whether a `Cookie` header holds the token."""
        try:
            found = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return False
        return found is not None and _same(found.value, self.token)


def _same(a: str, b: str) -> bool:
    """Whether they are equal, compared in constant time."""
    return hmac.compare_digest(a.encode(), b.encode())


def refused(method: str, headers: Mapping[str, str], port: int) -> str | None:
    """Why a request is not answered, by its headers; None where they are in order.

    `Host` has to be ours, or a name that an attacker resolves to 127.0.0.1 would do. What has an effect has
    to come from a page of ours, as the browser says of it.
    """
    hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
    host = headers.get("Host", "")
    if host not in hosts:
        return "the host is not this server's"
    site = headers.get("Sec-Fetch-Site")
    if method == "POST" and headers.get("Origin") != f"http://{host}":
        return "the request does not come from a page of this server"
    if site not in (None, "same-origin", *(("none",) if method != "POST" else ())):
        return "the request comes from another site"
    return None

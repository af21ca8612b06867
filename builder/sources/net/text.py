"""What strangers' headers and bodies say, made fit to be shown and used."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from builder.base.errors import printable
from builder.base.files import parse_json


class Headers(Protocol):
    """Headers by name, in whatever case hosts write them."""

    def get(self, name: str, /) -> Any:
        """The value, or None."""


LONGEST = 200  # characters of a host's own words
_URL = re.compile(r"(?i)\bhttps?://[^\s\"'<>`]+")
_RESERVED = re.compile(r"(?i)(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?")


def shown(url: str) -> str:
    """A URL fit for a message: without its query, which may be a signature, and without credentials."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" + ("?…" if parts.query else "")


def scrub(text: str, secrets: Iterable[str]) -> str:
    """`text` without the secrets, and without the queries of the URLs in it."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _URL.sub(lambda found: _shown_or_not(found[0]), text)


def _shown_or_not(url: str) -> str:
    try:
        return shown(url)
    except ValueError:
        return "…"


def page_kind(start: bytes, content_type: str) -> str | None:
    """What a body is when it is no model: `an HTML page`, `a JSON message`, `an XML message`; else None.

    `start` is the beginning of the body. A type in the header is not believed alone: some hosts call
    every file text.
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
    if re.match(rb"<(?:!doctype html|html|head|body|title|!--)", text):
        return "an HTML page"
    if text.startswith((b"<?xml", b"<error>")):
        return "an XML message"
    mime = content_type.partition(";")[0].strip().lower()
    if text.startswith((b"{", b"[")) and ("json" in mime or _is_json(start)):
        return "a JSON message"
    return None


def _is_json(body: bytes) -> bool:
    try:
        parse_json(body, strict=False)
    except ValueError:
        return False
    return True


def host_words(headers: Headers, body: bytes) -> str:
    """The host's own explanation of a failure, in one short printable line; empty when it gives none."""
    said = headers.get("X-Error-Message") or _json_words(body) or _markup_words(body) or ""
    said = " ".join(printable(said.replace("\n", " ")).split())
    return said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"


def _json_words(body: bytes) -> str | None:
    try:
        said = parse_json(body, strict=False)
    except ValueError:
        return None
    for _ in range(4):
        if isinstance(said, list) and said:
            said = said[0]
        if isinstance(said, dict):
            keys = ("message", "error_description", "error", "detail", "reason", "title", "errors")
            said = next((said[k] for k in keys if said.get(k)), None)
    return said if isinstance(said, str) else None


def _markup_words(body: bytes) -> str | None:
    text = body.decode("utf-8-sig", "replace")
    if text.lstrip()[:1] != "<":
        return text if text.isprintable() or text.strip().replace("\n", " ").isprintable() else None
    for tag in ("message", "title", "h1", "code"):
        if found := re.search(rf"(?is)<{tag}\b[^>]*>(.*?)</{tag}>", text):
            return html.unescape(re.sub(r"<[^>]*>", " ", found[1]))
    return None


def file_name(headers: Headers, url: str) -> str:
    """The name a host gives a file, by Content-Disposition or else by its URL, safe as a file's name.

    Never empty, never more than one part of a path, at most 128 characters.
    """
    said = headers.get("Content-Disposition") or ""
    if found := re.search(r"(?i)filename\*\s*=\s*utf-8'[^']*'([^;\s]+)", said):
        name = unquote(found[1], errors="replace")
    elif found := re.search(r"(?i)filename\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^;\s]+))", said):
        name = re.sub(r"\\(.)", r"\1", found[1]) if found[1] is not None else found[2]
    else:
        name = unquote(urlsplit(url).path.rpartition("/")[2])
    return safe_name(name)


def safe_name(name: str) -> str:
    """`name` as one part of a path that every system takes: no separators, controls or reserved words."""
    name = re.split(r"[/\\]", name)[-1]
    name = "".join(c if c.isprintable() and c not in '<>:"|?*' else "_" for c in name)
    name = name.strip(" .")
    if len(name) > 128:
        stem, dot, suffix = name.rpartition(".")
        name = stem[: 127 - len(suffix)] + dot + suffix if stem and len(suffix) < 16 else name[:128]
    return "download" if not name else "_" + name if _RESERVED.fullmatch(name) else name

"""Addresses: what is one, what it means, and what is said of what is none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.addresses import Civitai, HuggingFace, LocalFile, Web, check_address, parse_address
from builder.base.errors import UsageError
from builder.sources.net.text import file_name, host_words, page_kind, safe_name, scrub, shown

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("https://example.org/m.ckpt", Web("https://example.org/m.ckpt")),
        ("HTTPS://Example.ORG:443/a b.ckpt#top", Web("https://example.org/a%20b.ckpt")),
        ("https://example.org", Web("https://example.org/")),
        ("https://example.org/get?id=5&name=a%20b", Web("https://example.org/get?id=5&name=a%20b")),
        ("https://bücher.example/m", Web("https://xn--bcher-kva.example/m")),
        ("https://[2001:db8::1]:8443/m", Web("https://[2001:db8::1]:8443/m")),
        ("hf://org/name/model.safetensors", HuggingFace("org/name", "model.safetensors")),
        ("hf://org/name@v1.0/vae/model.bin", HuggingFace("org/name", "vae/model.bin", "v1.0")),
        ("hf://org/name@refs/pr/3/m.ckpt", HuggingFace("org/name", "m.ckpt", "refs/pr/3")),
        ("hf://org/name@my%2Fbranch/m.ckpt", HuggingFace("org/name", "m.ckpt", "my/branch")),
        ("hf://org/name/a@b.ckpt", HuggingFace("org/name", "a@b.ckpt")),
        (f"hf://org/name@{COMMIT}/m", HuggingFace("org/name", "m", COMMIT)),
        (
            "https://huggingface.co/org/name/resolve/main/sub/m%20x.ckpt?download=true",
            HuggingFace("org/name", "sub/m x.ckpt"),
        ),
        ("https://huggingface.co/org/name/resolve/v2/m.ckpt", HuggingFace("org/name", "m.ckpt", "v2")),
        ("https://huggingface.co/api/models/org/name", Web("https://huggingface.co/api/models/org/name")),
        ("https://huggingface.co:8443/org/name", Web("https://huggingface.co:8443/org/name")),
        ("civitai:128713", Civitai(128713)),
        ("civitai:128713@95000", Civitai(128713, 95000)),
        ("https://civitai.com/api/download/models/128713", Civitai(128713)),
        ("https://civitai.com/api/download/models/128713?fileId=9", Civitai(128713, 9)),
        ("https://civitai.red/api/download/models/1", Civitai(1, host="civitai.red")),
        ("https://civitai.green/api/download/models/1?fileId=9", Civitai(1, 9, host="civitai.green")),
        (
            "https://civitai.com.example/api/download/models/1",
            Web("https://civitai.com.example/api/download/models/1"),
        ),
        (
            "https://civitai.com/api/download/models/1?type=Model&fp=fp16",
            Web("https://civitai.com/api/download/models/1?type=Model&fp=fp16"),
        ),
        ("urn:air:sd1:checkpoint:civitai:4384@128713", Civitai(128713)),
        ("air:sd1:checkpoint:civitai:4384@128713", Civitai(128713)),
        ("sd1:model:civitai:4384@128713", Civitai(128713)),
        ("urn:air:sdxl:checkpoint:civitai:4384@128713+95000", Civitai(128713, 95000)),
        ("urn:air:sdxl:checkpoint:civitai:4384", Civitai(None, None, 4384)),
        (
            "urn:air:sdxl:lora:civitai:4384@128713.safetensor",
            Civitai(128713, None, 4384, "safetensor"),
        ),
        ("file:///srv/models/a%20b.ckpt", LocalFile("/srv/models/a b.ckpt")),
        ("file://localhost/srv/m.ckpt", LocalFile("/srv/m.ckpt")),
        ("file:models/a b.ckpt", LocalFile("models/a b.ckpt")),
        ("file:../m.ckpt", LocalFile("../m.ckpt")),
    ],
)
def test_an_address_is_understood(text: str, address: object) -> None:
    assert parse_address(text) == address
    assert check_address(text) is None
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "is not an address of a known kind"),
        ("model.ckpt", "is not an address of a known kind"),
        ("ftp://example.org/m", "is not an address of a known kind"),
        ("javascript:alert(1)", "is not an address of a known kind"),
        ("https://", "names no host"),
        ("https:///m.ckpt", "names no host"),
        ("https://exa mple.org/m", "names no host"),
        ("https://example.org:port/m", "is not a web address"),
        ("https://me:pw@example.org/m", "user name or password"),
        ("https://example.org\\@evil.example/m", "characters that no address has"),
        ("https://example.org/\u202ecod.ckpt", "characters that no address has"),
        ("https://example.org/m\n", "characters that no address has"),
        ("https://example.org/m?token=abc", "carries a secret in `token`"),
        ("https://example.org/m?X-Amz-Signature=abc", "carries a secret in `X-Amz-Signature`"),
        ("https://example.org/m?a=1&access_token=", "carries a secret in `access_token`"),
        ("hf://org/name", "is not of the form"),
        ("hf://name/", "is not of the form"),
        ("hf://org/name@/m", "is not of the form"),
        ("hf://org/name/../../etc/passwd", "`.` or `..` part"),
        ("hf://org/name/a//b", "`.` or `..` part"),
        ("hf://org/name@..%2F..%2Fx/m", "`.` or `..` part"),
        ("hf://../name/m", "is not the name of a Hugging Face repository"),
        ("hf://org/na--me/m", "is not the name of a Hugging Face repository"),
        ("hf://datasets/org/name/m", "is not in a model repository"),
        ("civitai:", "is not an address of a known kind"),
        ("civitai:12x", "is not an address of a known kind"),
        ("civitai:1@", "is not an address of a known kind"),
        ("urn:air:sd1:checkpoint:huggingface:name@main", "of AIR names only those at `civitai` are known"),
        ("urn:air:sd1:checkpoint:civitai:x@1", "are numbers"),
        ("file:", "names no file"),
        ("file://server/share/m.ckpt", "names a file of another machine, `server`"),
    ],
)
def test_what_is_no_address_is_said_to_be_none(text: str, fact: str) -> None:
    said = check_address(text)
    assert said is not None
    assert fact in said.fact
    with pytest.raises(UsageError) as raised:
        parse_address(text)
    assert raised.value.problems == (said,)


@pytest.mark.parametrize(
    ("page", "hint"),
    [
        (
            "huggingface.co/org/name/blob/v2/sub/m.ckpt?x=1",
            "`https://huggingface.co/org/name/resolve/v2/sub/m.ckpt`",
        ),
        ("hf.co/org/name/raw/main/m.ckpt", "`https://huggingface.co/org/name/resolve/main/m.ckpt`"),
        ("huggingface.co/datasets/o/n/blob/main/m", "`https://huggingface.co/datasets/o/n/resolve/main/m`"),
        ("huggingface.co/org/name", "`hf://org/name/PATH`"),
        ("huggingface.co/org/name/tree/main/vae", "`hf://org/name/PATH`"),
        ("civitai.com/models/4384?modelVersionId=128713", "the file is at `civitai:128713`"),
        ("civitai.com/models/4384/dreamshaper?modelVersionId=128713", "the file is at `civitai:128713`"),
        ("civitai.com/model-versions/128713", "the file is at `civitai:128713`"),
        ("civitai.com/models/4384/dreamshaper", "the newest version at `urn:air:other:other:civitai:4384`"),
        ("civitai.com/models/4384?modelVersionId=%1b[2J", "`civitai:VERSION`"),
        (
            "civitai.red/models/4?modelVersionId=5",
            "the file is at `https://civitai.red/api/download/models/5`",
        ),
        ("civitai.green/models/4", "`https://civitai.green/api/download/models/VERSION`"),
    ],
)
def test_a_page_is_refused_with_the_address_of_its_file(page: str, hint: str) -> None:
    said = check_address(f"https://{page}")
    assert said is not None
    assert said.fact.endswith("is a page, not a file")
    assert hint in str(said.hint)
    for address in re.findall(r"`((?:https|civitai|urn):[^`]*\d[^`]*)`", str(said.hint)):
        parse_address(address)


@given(
    st.text(max_size=60)
    | st.from_regex(r"(hf://|https://|civitai:|urn:air:|file:)[!-~]{0,50}", fullmatch=True)
)
@settings(max_examples=400)
def test_any_text_is_an_address_or_is_refused(text: str) -> None:
    if check_address(text) is None:
        address = parse_address(text)
        assert parse_address(str(address)) == address


def test_a_secret_is_not_repeated_in_the_refusal() -> None:
    for text in ("https://example.org/m?token=hunter2", "https://me:hunter2@example.org/m"):
        assert "hunter2" not in str(check_address(text))


def test_local_files_are_relative_to_the_recipe() -> None:
    assert LocalFile("../m.ckpt").under(Path("/recipes/a")) == Path("/recipes/a/../m.ckpt")
    assert LocalFile("/srv/m.ckpt").under(Path("/recipes")) == Path("/srv/m.ckpt")


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ('attachment; filename="model v1.safetensors"', "model v1.safetensors"),
        ("attachment; filename=model.ckpt; size=5", "model.ckpt"),
        ("attachment; filename=\"x.ckpt\"; filename*=UTF-8''%E2%82%AC.ckpt", "€.ckpt"),
        ('attachment; filename="../../etc/passwd"', "passwd"),
        ('attachment; filename="C:\\\\Windows\\\\x.ckpt"', "x.ckpt"),
        ("attachment; filename*=UTF-8''..%2f..%2f.bashrc", "bashrc"),
        ("attachment; filename*=UTF-8''a%00b%0a.ckpt", "a_b_.ckpt"),
        ('attachment; filename=".."', "download"),
        ('attachment; filename="CON.ckpt"', "_CON.ckpt"),
        ('attachment; filename="com1"', "_com1"),
        (f'attachment; filename="{"a" * 300}.safetensors"', "a" * 116 + ".safetensors"),
        ("inline", "in url.ckpt"),
    ],
)
def test_a_name_from_a_header_is_a_safe_name(header: str, name: str) -> None:
    assert file_name({"Content-Disposition": header}, "https://h/p/in%20url.ckpt?sig=1") == name


@given(st.text(max_size=300))
def test_any_name_becomes_one_part_of_a_path(text: str) -> None:
    name = safe_name(text)
    assert name and len(name) <= 129 and name not in {".", ".."}
    assert not set(name) & set('/\\\0<>:"|?*') and name.isprintable()
    assert safe_name(name) == name


def test_urls_are_shown_without_queries_and_texts_without_secrets() -> None:
    assert shown("https://u:p@h.example/a?X-Amz-Signature=s") == "https://h.example/a?…"
    said = scrub("see https://h/a?sig=x, bearer hf_abc!", ["hf_abc"])
    assert said == "see https://h/a?… bearer ***!"


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"<!DOCTYPE html><title>Log &amp; in</title>", "an HTML page", "Log & in"),
        (b"\xef\xbb\xbf  <html><h1>No <b>way</b></h1>", "an HTML page", "No way"),
        (b'{"error": "Unauthorized", "message": "log in\nplease"}', "a JSON message", "log in please"),
        (b'{"errors": [{"detail": "gone"}]}', "a JSON message", "gone"),
        (
            b"<?xml version='1.0'?><Error><Code>A</Code><Message>expired</Message></Error>",
            "an XML message",
            "expired",
        ),
        (b'{"a": "\x1b[31mred"}', "a JSON message", ""),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", None, ""),
        (b"PK\x03\x04", None, ""),
        (b"plain words\n", None, "plain words"),
    ],
)
def test_pages_and_messages_are_told_from_files(body: bytes, kind: str | None, words: str) -> None:
    assert page_kind(body, "application/octet-stream") == kind
    assert host_words({}, body) == words


def test_what_a_host_says_cannot_drive_a_terminal_or_fill_it() -> None:
    said = host_words({}, b'{"message": "\\u001b[2J\\u202e' + b"x" * 1000 + b'"}')
    assert said.isprintable() and len(said) == 200


def test_reading_an_address_imports_nothing_of_the_network() -> None:
    code = "import sys, builder.base.addresses; print({'ssl', 'socket', 'http.client'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"

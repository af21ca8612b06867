"""What is read of a path that anything may be at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builder.base.errors import LockError
from builder.base.files import NotRegular, parse_json, read_bounded, read_text
from tests.help.special_files import pipe, socket, zeros


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [pipe, zeros, socket, folder])
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "x"
    make(path)
    with pytest.raises(OSError) as caught:
        read_bounded(path, 100)
    assert isinstance(caught.value, NotRegular) or make is socket
    with pytest.raises(LockError):
        read_text(path, 100, LockError)


def test_a_file_of_the_right_size(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * 100)
    assert read_bounded(path, 100) == b"a" * 100
    with pytest.raises(OSError, match="100 bytes, more than 99"):
        read_bounded(path, 99)


def test_a_file_that_says_it_is_empty() -> None:
    assert read_bounded("/proc/self/environ", 100) == b"", "what the kernel makes up has no bounded size"


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "x", 1, LockError)
    with pytest.raises(OSError, match="NUL"):
        read_bounded("a\0b", 1)


def test_text_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a\nb\xff")
    with pytest.raises(LockError) as caught:
        read_text(path, 10, LockError, "the lock")
    (problem,) = caught.value.problems
    assert problem.place is not None and (problem.place.path, problem.place.line) == ("the lock", 2)


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b"[" + b"[]," * 100_000 + b"0]", b'{"a": "\\ud800"}', b"{", b"\xff"]
)
def test_json_that_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_that_is_read() -> None:
    assert parse_json(b'{"a": ["\\ud83d\\ude00", 1]}') == {"a": ["\U0001f600", 1]}

"""Files that appear whole or not at all, with and without nameless files."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.base import disk
from builder.base.errors import OutputError


@pytest.fixture(params=[True, False], ids=["nameless", "named"], autouse=True)
def nameless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "NAMELESS", disk.NAMELESS and request.param)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_is_there_when_the_block_ends(tmp_path: Path, durable: bool, old: bytes | None) -> None:
    path = tmp_path / "x"
    if old is not None:
        path.write_bytes(old)
    with disk.replacing(path, durable=durable) as fd:
        disk.write_all(fd, memoryview(b"new"), 0)
        assert (path.read_bytes() if path.exists() else None) == old
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_happens_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "x").write_bytes(b"old")
    for name in ("x", "y"):
        with pytest.raises(error), disk.replacing(tmp_path / name) as fd:
            os.write(fd, b"new")
            raise error
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_link_is_replaced_and_what_it_points_at_is_not(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"blob")
    for target in ("blob", "nowhere"):
        link = tmp_path / f"to-{target}"
        link.symlink_to(target)
        disk.write_bytes(link, b"new")
        assert not link.is_symlink()
        assert link.read_bytes() == b"new"
    assert (tmp_path / "blob").read_bytes() == b"blob"
    assert names(tmp_path) == ["blob", "to-blob", "to-nowhere"]


def test_a_link_that_already_says_it_is_left(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"same")
    (tmp_path / "link").symlink_to("blob")
    assert not disk.write_bytes(tmp_path / "link", b"same")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        disk.write_bytes(tmp_path / "x", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("name", "evidence", "hint"),
    [
        ("folder", "it is a folder", "give a file name"),
        ("pipe", "it is no regular file", "give a file name"),
        ("link-to-pipe", "it is no regular file", "give a file name"),
        ("none/x", "No such file or directory", "make its folder first"),
        ("file/x", "Not a directory", None),
        ("n" * 300, "File name too long", None),
    ],
)
def test_what_cannot_be_replaced(tmp_path: Path, name: str, evidence: str, hint: str | None) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link-to-pipe").symlink_to("pipe")
    before = names(tmp_path)
    with pytest.raises(OutputError) as caught:
        disk.write_bytes(tmp_path / name, b"x")
    problem = caught.value.problems[0]
    assert (problem.fact, problem.evidence, problem.hint) == (
        f"cannot write `{tmp_path / name}`",
        (evidence,),
        hint,
    )
    assert names(tmp_path) == before


def test_an_input_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"in")
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(OutputError) as caught, disk.replacing(tmp_path / "link", inputs=[tmp_path / "in"]):
        pass
    problem = caught.value.problems[0]
    assert problem.fact == f"the output `{tmp_path / 'link'}` is one of the inputs"
    assert problem.evidence == (f"it is the same file as `{tmp_path / 'in'}`",)
    with disk.replacing(tmp_path / "other", inputs=[tmp_path / "in"]):
        pass


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """The temporary file of a process that lives."""
    path = tmp_path / ".ckpt-00000000000000aa.tmp"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def test_what_the_dead_left_is_removed(tmp_path: Path, locked: Path) -> None:
    stale = tmp_path / ".ckpt-00000000000000bb.tmp"
    stale.write_bytes(b"half")
    foreign = [".ckpt-0.tmp", "ckpt-00000000000000cc.tmp", ".ckpt-00000000000000cc.tmp.safetensors"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"theirs")
    disk.write_bytes(tmp_path / "x", b"new")
    assert names(tmp_path) == sorted([*foreign, locked.name, "x"])


def test_a_file_being_written_is_not_taken_for_stale(tmp_path: Path) -> None:
    with disk.replacing(tmp_path / "x") as fd:
        os.write(fd, b"x")
        disk.write_bytes(tmp_path / "y", b"y")
    assert names(tmp_path) == ["x", "y"]
    assert (tmp_path / "x").read_bytes() == b"x"


def test_many_at_once_in_one_folder(tmp_path: Path) -> None:
    """Each makes and removes temporary names while the others look for stale ones."""
    errors: list[BaseException] = []

    def work(text: str) -> None:
        try:
            for turn in range(30):
                disk.write_text(tmp_path / "x", text * turn, durable=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(c,)) for c in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert names(tmp_path) == ["x"]
    assert len({*(tmp_path / "x").read_text()}) == 1


def test_text_is_rewritten_only_when_it_differs(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert disk.write_text(path, "é\n")
    before = path.stat()
    assert not disk.write_text(path, "é\n")
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # reading moves st_atime
    assert disk.write_text(path, "e\n")
    assert path.read_bytes() == b"e\n"


def test_an_error_of_the_block_is_told_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, disk.replacing(tmp_path / "x"):
        raise OSError(errno.EDQUOT, "ignored")
    assert caught.value.problems[0].evidence == (os.strerror(errno.EDQUOT),)
    assert caught.value.problems[0].hint == "make room there, or write to another folder"
    assert names(tmp_path) == []


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(names(Path("/dev/fd")))
    for n in range(5):
        disk.write_text(tmp_path / "x", str(n))
        with pytest.raises(ZeroDivisionError), disk.replacing(tmp_path / "x"):
            raise ZeroDivisionError
    assert len(names(Path("/dev/fd"))) == before


@pytest.mark.parametrize("makes", ["new_folder", "new_set"])
def test_what_fails_in_a_folder_is_named_as_it_would_be(makes: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(OutputError) as caught, getattr(disk, makes)(path) as temp:
        disk.write_bytes(temp / "part" / "x", b"1")
    home = path if makes == "new_folder" else tmp_path
    assert [p.fact for p in caught.value.problems] == [f"cannot write `{home / 'part' / 'x'}`"]
    assert list(tmp_path.iterdir()) == []

"""The disk: files and folders that appear whole or not at all, locks, and what the dead left behind."""

from __future__ import annotations

import errno
import filecmp
import os
import re
import secrets
import shutil
import signal
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from builder.base.descriptors import MORE
from builder.base.errors import OutputError, Problem
from builder.base.signals import go_on

try:
    import fcntl
except ImportError:  # Windows: nothing is ever locked there, and only age tells what is stale
    fcntl = None  # type: ignore[assignment]

NAMELESS = hasattr(os, "O_TMPFILE")  # whether to try files without a name; tests unset it
OLD = 24 * 3600  # seconds after which, where locks do not work, something unfinished counts as left behind

_FLUSH = 1 << 20  # bytes from which telling the system about a write is worth a call
_NO_NAMELESS = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_TEMP = re.compile(r"\.ckpt-[0-9a-f]{16}\.tmp")
_BINARY = getattr(os, "O_BINARY", 0)
_HINTS = {
    errno.EACCES: "see who may write there, and which program holds it open",
    errno.EMFILE: MORE,
    errno.ENOENT: "make its folder first",
    errno.ENOSPC: "make room there, or write to another folder",
    errno.EDQUOT: "make room there, or write to another folder",
    errno.EFBIG: "files this large are not allowed there: write to another folder",
}

# -- reading and writing at positions

_seeking = threading.Lock()  # where the system has no positioned reads, a descriptor has one position for all


def read_at(fd: int, out: memoryview, offset: int) -> int:
    """Read at most `len(out)` bytes from `offset` on; the number of bytes read, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(out))
    out[: len(data)] = data
    return len(data)


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at `offset`; raises OSError."""
    data, done = memoryview(data), 0
    while done < len(data):
        if hasattr(os, "pwrite"):
            done += os.pwrite(fd, data[done:], offset + done)
            continue
        with _seeking:
            os.lseek(fd, offset + done, os.SEEK_SET)
            done += os.write(fd, data[done:])


def write_through(fd: int, data: memoryview, offset: int) -> None:
    """Write as `write_all`, and start the way to the disk at once: so that little is left for fsync."""
    write_all(fd, data, offset)
    if len(data) >= _FLUSH and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, len(data), os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk, where the system can."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# -- locks


def try_lock(fd: int) -> bool | None:
    """Lock an open file or folder if nobody else has; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lock(fd: int) -> None:
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks: its files are then never found stale
            fcntl.flock(fd, fcntl.LOCK_EX)


def _left_behind(fd: int) -> bool:
    """Whether nobody works on an open temporary file or folder any more."""
    locked = try_lock(fd)
    return locked or (locked is None and time.time() - os.fstat(fd).st_mtime > OLD)


def being_written(path: Path) -> bool:
    """Whether a process has a file open for writing; False also where the system does not tell."""
    if fcntl is None or not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # A lease for reading is refused while there is a writer. Should one come in the same instant, the
        # signal about it must be one that is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    finally:
        os.close(fd)
    return False


# -- files


@dataclass
class NewFile:
    """A file in the making: its descriptor, open for reading and writing, and where it will be.

    `path` may be set to another name in the same folder, or to None, and then the file vanishes.
    """

    fd: int
    path: Path | None

    def reserve(self, size: int) -> None:
        """Raise OutputError where there is no room for `size` bytes beside what others in the making need."""
        assert self.path is not None
        with _reserving:
            free, device = _free(self.fd, self.path.parent), os.fstat(self.fd).st_dev
            others = sum(_lacking(fd, device) for fd in _reserved if fd != self.fd)
            if free is None or size <= free - others:
                _reserved[self.fd] = size
                return
        beside = f", of which what is written beside it takes {others:,}" * bool(others)
        raise OutputError(
            Problem(
                f"there is no room to write `{self.path}`",
                evidence=(f"it needs {size:,} bytes, {free:,} are free{beside}",),
                hint="make room there, or write to another folder",
            )
        )


_reserved: dict[int, int] = {}  # the sizes that files in the making will have, by descriptor
_reserving = threading.Lock()


def _free(fd: int, folder: Path) -> int | None:
    """The bytes that are free where an open file of a folder lies; None where that is not told."""
    if not hasattr(os, "fstatvfs"):
        return shutil.disk_usage(folder).free
    disk = os.fstatvfs(fd)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None  # some network file systems have none


def _lacking(fd: int, device: int) -> int:
    """The bytes that a file in the making will still take on a device."""
    found = os.fstat(fd)
    if found.st_dev != device:
        return 0
    has = found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size
    return max(0, _reserved[fd] - has)


@contextmanager
def new_file(
    path: Path | str, *, durable: bool = True, inputs: Iterable[os.stat_result | Path | str] = ()
) -> Iterator[NewFile]:
    """A new file that takes the place of `path` when the block ends, and vanishes when the block fails.

    Where the system can, the file has no name until it is whole, so that even a killed process leaves
    nothing; elsewhere it has a temporary one, and the next file made in that folder removes what the dead
    left behind. A symbolic link at `path` is itself replaced: what it points at, such as a blob of a
    download cache, stays as it is. Permissions are those of any new file. With `durable`, the file and its
    name are on disk at the end.
    Raises OutputError when `path` is one of `inputs` (by path, link or inode) or no regular file, and for
    every OSError of making the file or of the block.
    """
    path, inputs = Path(path), tuple(inputs)
    try:
        may_replace(path, inputs)
        with _Folder(path.parent) as folder, _unnamed(folder) as made:
            file = NewFile(made.fd, path)
            yield file
            go_on()
            if file.path is not None:
                if file.path != path:
                    assert file.path.parent == path.parent, "a file cannot move from where it was made"
                    may_replace(file.path, inputs)
                made.name(file.path.name, durable)
    except OSError as error:
        raise output_error(path, error) from None


@contextmanager
def replacing(
    path: Path | str, *, durable: bool = True, inputs: Iterable[os.stat_result | Path | str] = ()
) -> Iterator[int]:
    """The descriptor of a `new_file` that goes nowhere else; raises as that does."""
    with new_file(path, durable=durable, inputs=inputs) as file:
        yield file.fd


def write_bytes(
    path: Path | str,
    data: bytes,
    *,
    durable: bool = True,
    inputs: Iterable[os.stat_result | Path | str] = (),
) -> bool:
    """Make `path` hold `data`; False when it already does, and is left untouched. Raises as `replacing`."""
    path = Path(path)
    with suppress(OSError):
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return False
    with replacing(path, durable=durable, inputs=inputs) as fd:
        write_all(fd, memoryview(data), 0)
    return True


def write_text(path: Path | str, text: str, *, durable: bool = True) -> bool:
    """Make `path` hold `text` as UTF-8; False when it already does, and is left untouched."""
    return write_bytes(path, text.encode("utf-8"), durable=durable)


def check_place(path: Path) -> None:
    """Raise OutputError where no file `path` could be made now; nothing is left of the attempt."""
    with new_file(path, durable=False) as file:
        file.path = None


@contextmanager
def making_folders(folders: Iterable[Path]) -> Iterator[None]:
    """With folders that files can be made in; those made here are gone at the end if nothing is in them.

    Raises OutputError.
    """
    made: list[Path] = []
    try:
        for folder in folders:
            missing = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
            for path in reversed(missing):
                try:
                    path.mkdir()
                except FileExistsError:  # by another build
                    continue
                except OSError as error:
                    raise output_error(path, error) from None
                made.append(path)
            try:
                with _Folder(folder) as held, _unnamed(held):
                    pass
            except OSError as error:
                raise output_error(folder, error) from None
        yield
    finally:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()


def output_error(path: Path | str, error: OSError) -> OutputError:
    """What a person is told when writing `path` failed."""
    code = error.errno or 0
    return OutputError(
        Problem(f"cannot write `{path}`", evidence=(os.strerror(code),), hint=_HINTS.get(code))
    )


def may_replace(path: Path, inputs: Iterable[os.stat_result | Path | str]) -> None:
    """Raise OutputError when `path` is one of `inputs` (by path, link or inode), or no regular file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(path, error) from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise OutputError(
            Problem(f"cannot write `{path}`", evidence=(f"it is {what}",), hint="give a file name")
        )
    for given in inputs:
        try:
            other = given if isinstance(given, os.stat_result) else Path(given).stat()
        except OSError:
            continue
        if os.path.samestat(found, other):
            name = path if isinstance(given, os.stat_result) else given
            raise OutputError(
                Problem(
                    f"the output `{path}` is one of the inputs",
                    evidence=(f"it is the same file as `{name}`",) if Path(name) != path else (),
                    hint="give the output another name",
                )
            )


class _Folder:
    """A folder that files are made in: held open where the system can, so that it stays the one it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd: int | None = None

    def __enter__(self) -> _Folder:
        if os.open in os.supports_dir_fd:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._remove_stale()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.fd is not None:
            os.close(self.fd)

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Open a file in it."""
        return os.open(self._at(name), flags | _BINARY, mode, dir_fd=self.fd)

    def rename(self, name: str, to: str) -> None:
        """Give a file in it another name, in place of what has that."""
        if self.fd is None:
            Path(self._at(name)).replace(self._at(to))
        else:
            os.rename(name, to, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def unlink(self, name: str) -> None:
        """Remove a file in it."""
        os.unlink(self._at(name), dir_fd=self.fd)

    def sync(self) -> None:
        """Have its names on the disk."""
        if self.fd is not None:
            os.fsync(self.fd)

    def _at(self, name: str) -> str:
        return name if self.fd is not None else str(self.path / name)

    def _remove_stale(self) -> None:
        """Remove the temporary files of dead processes: those that nobody holds locked."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        here = self.path if self.fd is None else self.fd
        for name in filter(_TEMP.fullmatch, os.listdir(here)):  # noqa: PTH208 - it may be a descriptor
            with suppress(OSError):
                fd = self.open(name, flags)
                try:
                    stale = _left_behind(fd)
                    if stale and self.fd is not None:
                        self.unlink(name)
                finally:
                    os.close(fd)
                if stale and self.fd is None:  # an open file cannot be removed everywhere
                    self.unlink(name)


@dataclass
class _Unnamed:
    """A new file in a folder, open, and the temporary names that it has there, if any."""

    folder: _Folder
    fd: int
    temp: list[str]
    closed: bool = False

    def name(self, name: str, durable: bool) -> None:
        """Give it its name at last, in place of what has it."""
        if durable:
            os.fsync(self.fd)
        if not self.temp:
            try:
                _link(self.fd, self.folder, name)
            except FileExistsError:  # a link never replaces, so it takes a name to be renamed from
                self.temp.append(_temp_name())
                _link(self.fd, self.folder, self.temp[0])
        if self.temp:
            if self.folder.fd is None:
                self.close()  # an open file cannot be renamed everywhere
            self.folder.rename(self.temp[0], name)
            self.temp.clear()
        if durable:
            self.folder.sync()

    def close(self) -> None:
        """Close it, once: another thread may have its number a moment later."""
        if not self.closed:
            self.closed = True
            with _reserving:
                _reserved.pop(self.fd, None)
            os.close(self.fd)


@contextmanager
def _unnamed(folder: _Folder) -> Iterator[_Unnamed]:
    """A new file, which is gone at the end unless it got its name."""
    fd = _nameless(folder)
    made = _Unnamed(folder, *((fd, []) if fd is not None else _named(folder)))
    try:
        yield made
    finally:
        with suppress(OSError):
            made.close()
        for name in made.temp:
            with suppress(OSError):
                folder.unlink(name)


def _nameless(folder: _Folder) -> int | None:
    """A locked file without a name, or None where there are none or they could not get one later."""
    if not NAMELESS or folder.fd is None:
        return None
    try:
        fd = folder.open(".", os.O_TMPFILE | os.O_RDWR)
    except OSError as error:
        if error.errno in _NO_NAMELESS:
            return None
        raise
    if not Path(_by_descriptor(fd)).exists():
        os.close(fd)
        return None
    _lock(fd)
    return fd


def _named(folder: _Folder) -> tuple[int, list[str]]:
    """A locked file with a temporary name."""
    while True:
        name = _temp_name()
        fd = folder.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        _lock(fd)
        if fcntl is None or os.fstat(fd).st_nlink:  # else another took it for stale before it was locked
            return fd, [name]
        os.close(fd)


def _temp_name(kind: str = "tmp") -> str:
    return f".ckpt-{secrets.token_hex(8)}.{kind}"


def _by_descriptor(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _link(fd: int, folder: _Folder, name: str) -> None:
    # `dst_dir_fd` makes Python call linkat, without which the link in /proc would not be followed.
    os.link(_by_descriptor(fd), name, dst_dir_fd=folder.fd, follow_symlinks=True)


# -- folders


@contextmanager
def new_folder(path: Path, *, durable: bool = True, anew: bool = True) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends, and vanishes when the block fails.

    Until then it lies beside `path` under a temporary name; what a killed process left of one is removed
    by the next. An existing folder is never replaced, unless it is empty. With `durable` names are on
    disk at the end; files are their writers' concern. Without `anew`, `path` may be taken until the end.
    Raises OutputError when `path` is taken, and for every OSError of making the folder or of the block.
    """
    if anew:
        check_free(path)
    with _beside(path, path) as temp:
        yield temp
        if durable:
            for folder, _, _ in os.walk(temp):
                sync_folder(Path(folder))
        check_free(path)
        with suppress(FileNotFoundError):
            path.rmdir()  # an empty folder, in whose place nothing can be renamed everywhere
        temp.rename(path)
        if durable:
            sync_folder(path.parent)


@contextmanager
def new_set(index: Path, *, durable: bool = True, anew: bool = True) -> Iterator[Path]:
    """A new folder whose files are moved beside `index` when the block ends, and `index`, one of them, last.

    So the index never names a file that is not there. Existing files are never replaced; shards that are the
    same already, as a killed process leaves them, serve.
    Raises OutputError when `index` or another name is taken, and as `new_folder` does.
    """
    if anew:
        check_free(index)
    with _beside(index, index.parent) as temp:
        yield temp
        made = sorted(temp.iterdir(), key=lambda p: (p.name == index.name, p.name))
        made = [f for f in made if f.name == index.name or not _is_there(f, index.with_name(f.name))]
        try:
            for file in made:
                check_free(index.with_name(file.name))
                file.rename(index.with_name(file.name))
        except BaseException:
            for file in made:
                if not file.exists():
                    index.with_name(file.name).unlink()
            raise
        if durable:
            sync_folder(index.parent)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`, gone at the end with all that is left in it; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    made, lock = _locked_folder(folder)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(folder: Path) -> int:
    """Remove what dead processes left in `folder`; the number of bytes freed."""
    freed = 0
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            with suppress(OSError):
                freed += _sweep(path)
    return freed


@contextmanager
def _beside(path: Path, home: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; an OutputError about a file in it names it by its folder-to-be."""
    temp: Path | None = None
    try:
        for found in path.parent.iterdir():
            if found.name.startswith(".ckpt-") and found.suffix == ".new":
                with suppress(OSError):
                    _sweep(found)
        with scratch_folder(path.parent) as temp:
            yield temp
    except OSError as error:
        raise output_error(path, error) from None
    except OutputError as error:  # of a file in the folder, whose name for now says nothing to anyone
        now, then = f"{temp}{os.sep}", str(home / "_")[:-1]
        error.problems = tuple(replace(p, fact=p.fact.replace(now, then)) for p in error.problems)
        raise


def _locked_folder(parent: Path) -> tuple[Path, int | None]:
    """A new folder, and a descriptor that holds it locked where that can be."""
    while True:
        made = parent / _temp_name("new")
        made.mkdir()
        if fcntl is None:
            return made, None
        try:
            lock = os.open(made, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for litter, as below
            continue
        _lock(lock)
        if made.exists():
            return made, lock
        os.close(lock)


def _sweep(path: Path) -> int:
    """Remove a folder that nobody holds locked; the bytes freed."""
    if fcntl is None:
        if path.is_symlink() or not path.is_dir() or time.time() - path.stat().st_mtime < OLD:
            return 0
        return _remove_tree(path)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        return _remove_tree(path) if _left_behind(lock) else 0
    finally:
        os.close(lock)


def _remove_tree(path: Path) -> int:
    freed = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    shutil.rmtree(path)
    return freed


def _is_there(file: Path, place: Path) -> bool:
    """Whether a file with the same bytes is in a place, and no link."""
    return place.is_file() and not place.is_symlink() and filecmp.cmp(file, place, shallow=False)


def _is_empty_folder(path: Path) -> bool:
    try:
        return not path.is_symlink() and next(path.iterdir(), None) is None
    except OSError:
        return False


def check_free(path: Path) -> None:
    """Raise OutputError when something has the name of what never replaces: all but an empty folder."""
    if os.path.lexists(path) and not _is_empty_folder(path):
        fact = f"`{path}` exists already"
        raise OutputError(Problem(fact, hint="remove it first, or give the output another name"))

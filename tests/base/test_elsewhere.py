"""Systems without the locks and the calls of Linux: what is made is the same."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.help.building import RECIPE, ROOT, Folder, files, save_dirty

# As on Windows: no locks, no positioned reads and writes, no folders held open or flushed, no nameless files;
# a file that is open is neither removed nor renamed nor replaced, and renaming replaces nothing.
WITHOUT = """
import os, shutil, sys
assert "builder.base.disk" not in sys.modules, "it is to be without them from the start"
sys.modules["fcntl"] = None
shutil._use_fd_functions = False
for name in (
    "preadv", "pread", "pwritev", "pwrite", "posix_fadvise", "fstatvfs", "geteuid", "getuid", "fchmod",
    "sched_getaffinity", "O_TMPFILE", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC",
):
    delattr(os, name)
os.supports_dir_fd = set()
_open = os.open
def open_file(path, *args, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return _open(path, *args, **more)
def is_open(path):
    names = (os.path.join("/proc/self/fd", n) for n in os.listdir("/proc/self/fd"))
    return os.path.isfile(path) and any(os.path.exists(n) and os.path.samefile(n, path) for n in names)
def closed(call):
    def checked(*paths, **more):
        for path in paths:
            if is_open(path):
                raise PermissionError(13, "Permission denied", str(path))
        return call(*paths, **more)
    return checked
os.open = open_file
_close, _rename = os.close, os.rename
def close(fd):
    assert os.path.lexists(f"/proc/self/fd/{fd}"), "closed twice: another thread may have it by now"
    _close(fd)
def rename(path, to, **more):
    if os.path.lexists(to):
        raise FileExistsError(17, "File exists", str(to))
    _rename(path, to, **more)
os.close, os.rename = close, rename
for name in ("rename", "replace", "unlink", "remove"):
    setattr(os, name, closed(getattr(os, name)))
"""
COMMANDS = [
    line.split()
    for line in """\
build tiny.toml
build tiny.toml
lock tiny.toml --upgrade
verify tiny.toml
build next.toml
build tiny.toml
build tiny.toml -o other.ckpt --check
build tiny.toml -o other.ckpt
extract tiny.safetensors VAE -o v.safetensors
extract tiny.safetensors VAE -o v.safetensors
replace tiny.safetensors VAE=vae.safetensors -o r.safetensors --save-recipe r.toml
merge tiny.safetensors r.safetensors -o m.safetensors
prune dirty.ckpt
prune --watch inbox --into models --layout comfyui --once --settle 0
convert tiny.safetensors -o set/x.safetensors.index.json
convert tiny.safetensors -o c.ckpt
new tiny.safetensors -o n.toml
store check
store gc --max-size 0
build tiny.toml --frozen
""".splitlines()
]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="nothing says which files are open")
def test_all_that_is_made_is_the_same_without_them(tmp_path: Path) -> None:
    folder = Folder.below(tmp_path).tiny()
    for name in ("set", "inbox", "models"):
        (folder / name).mkdir()
    save_dirty(folder / "inbox/x.ckpt")
    # Its output takes the place of another's, whose components it has.
    text = RECIPE.replace('name = "tiny"', 'name = "next"\noutput.file = "tiny.safetensors"')
    folder.write("next.toml", text.replace('fixes = ["clip-position-ids"]\n', ""))
    other = folder.beside("other", store="other-store")
    said = [folder(*command) for command in COMMANDS]
    assert [s.code for s in said] == [0] * len(COMMANDS), [s.err for s in said if s.code]
    runs = "".join(f"code = run({c!r})\nassert code == 0, ({c!r}, code)\n" for c in COMMANDS)
    runs += (
        "from pathlib import Path\nfrom builder.base.disk import new_folder\nPath('empty').mkdir()\n"
        "with new_folder(Path('empty')) as made:\n    (made / 'x').touch()\n"
        "assert Path('empty/x').is_file()\nimport shutil\nshutil.rmtree('empty')\n"
    )
    elsewhere = other.process("store", "list", before=WITHOUT + runs, CKPT_STORE_KEEP="all")
    assert elsewhere.code == 0, elsewhere.err
    assert files(other.path) == files(folder.path) > {"m.safetensors", "models/checkpoints"}
    for name in files(folder.path):
        if (folder / name).is_file():
            assert (other / name).read_bytes() == (folder / name).read_bytes(), name


def test_only_the_disk_knows_of_locks_and_positions() -> None:
    """Every other module goes through `builder.base.disk`."""
    wrong = []
    for path in sorted((ROOT / "builder").rglob("*.py")):
        if path.name == "disk.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and any(a.name in ("fcntl", "msvcrt") for a in node.names):
                wrong.append(f"{path}: fcntl")
            if isinstance(node, ast.Attribute) and node.attr in ("pwrite", "preadv", "pread", "O_TMPFILE"):
                wrong.append(f"{path}:{node.lineno}: {node.attr}")
    assert not wrong

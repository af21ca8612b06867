"""What a stranger's recipe can do: cost time and disk, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.help.building import ROOT, Folder, model, save, save_dirty

SECRET = "machine example.com login me password s3cr3t-s3cr3t"
HEAD = 'format = 1\nname = "x"\nbase = "NEW VAE-tiny"\ncomponents.VAE-tiny = "s"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A stranger's folder, beside it what is the user's own."""
    path = tmp_path / "stranger"
    path.mkdir()
    made = Folder(path, tmp_path / "store")
    save(path / "vae.safetensors", model("VAE-tiny", seed=1))
    own = tmp_path / "own"
    own.mkdir()
    (own / ".netrc").write_text(SECRET + "\n")
    (own / "id_rsa").write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n")
    save(own / "precious.safetensors", model("VAE-tiny", seed=9))
    (own / "precious.yaml").write_text("model: mine\n")
    return made


def own(folder: Folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder.path.parent / "own").iterdir()}


COMMANDS = (("plan",), ("build",), ("lock",))


@pytest.mark.parametrize(
    "named", ["../own/.netrc", "{own}/.netrc", "link", "linked/.netrc", "/proc/self/environ"]
)
@pytest.mark.parametrize("key", ["file", "urls", "recipe"])
def test_nothing_outside_is_read_or_shown(folder: Folder, named: str, key: str) -> None:
    there = folder.path.parent / "own"
    (folder / "link").symlink_to(there / ".netrc")
    (folder / "linked").symlink_to(there)
    os.environ["A_TOKEN"] = SECRET
    named = named.format(own=there)
    value = f'["file:{named}"]' if key == "urls" else f'"{named}"'
    folder.write("x.toml", HEAD + f"sources.s.{key} = {value}\n")
    for command in COMMANDS:
        said = folder(*command, "x.toml")
        assert said.code == 3, said.err
        assert "s3cr3t" not in said.out + said.err and "PRIVATE" not in said.out + said.err
        assert "outside the recipe's folder" in said.err or "no recipe" in said.err
    os.environ.pop("A_TOKEN")


def test_what_is_allowed_outside(folder: Folder) -> None:
    """A folder of models is the user's own word; so is `--allow-outside`."""
    save(folder.path.parent / "models" / "v.safetensors", model("VAE-tiny", seed=2))
    (folder / "v.safetensors").symlink_to(folder.path.parent / "models" / "v.safetensors")
    folder.write("x.toml", HEAD + 'sources.s.file = "v.safetensors"\n')
    assert folder("build", "x.toml").code == 3
    assert folder("build", "x.toml", "--allow-outside").code == 0
    (folder / "x.safetensors").unlink()
    models = Folder(folder.path, folder.store, {"CKPT_MODELS": str(folder.path.parent / "models")})
    assert models("build", "x.toml").code == 0


@pytest.mark.parametrize("command", ["build", "inspect", "new", "extract", "prune"])
def test_what_is_not_recognised_is_not_quoted(folder: Folder, command: str) -> None:
    for name in (".netrc", "id_rsa"):
        file = folder.path.parent / "own" / name
        words = [command, file, *(["VAE"] if command == "extract" else [])]
        if command == "build":
            save_dirty(folder / "d.ckpt")
            folder.write("x.toml", HEAD + f'sources.s.file = "{file}"\n')
            words = ["build", "x.toml", "--allow-outside"]
        said = folder(*words)
        assert said.code in (3, 6)
        assert "s3cr3t" not in said.out + said.err and "PRIVATE" not in said.out + said.err


def test_outputs_stay_in_the_folder(folder: Folder) -> None:
    """A link to a folder or to a file in the place of an output leads nowhere."""
    before = own(folder)
    (folder / "out").symlink_to(folder.path.parent / "own")
    (folder / "x.safetensors").symlink_to(folder.path.parent / "own" / "precious.safetensors")
    text = HEAD + 'sources.s.file = "vae.safetensors"\n'
    folder.write("x.toml", text + 'output.file = "out/precious.safetensors"\n')
    said = folder("build", "x.toml")
    assert said.code == 3 and "outside the recipe's folder" in said.err
    folder.write("x.toml", text)
    assert folder("build", "x.toml").code == 0
    assert own(folder) == before and not (folder / "x.safetensors").is_symlink()


def test_configurations_stay_in_the_folder(folder: Folder) -> None:
    before = own(folder)
    text = HEAD + 'sources.s.file = "vae.safetensors"\n[output]\nconfig = "c.yaml"\n'
    for target in ("id_rsa", ".netrc"):
        (folder / "c.yaml").unlink(missing_ok=True)
        (folder / "c.yaml").symlink_to(folder.path.parent / "own" / target)
        folder.write("x.toml", text)
        said = folder("build", "x.toml")
        assert said.code == 3 and "s3cr3t" not in said.err and not (folder / "x.yaml").exists()
    (folder / "c.yaml").unlink()
    (folder / "c.yaml").write_text("model: theirs\n")
    (folder / "x.yaml").symlink_to(folder.path.parent / "own" / "precious.yaml")
    said = folder("build", "x.toml")
    assert said.code == 0 and "stays as it is" in said.err
    assert own(folder) == before


def test_a_configuration_that_is_not_ours_stays(folder: Folder) -> None:
    (folder / "c.yaml").write_text("model: one\n")
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n[output]\nconfig = "c.yaml"\n')
    (folder / "x.yaml").write_text("the user's own\n")
    assert "stays as it is" in folder("build", "x.toml").err
    assert (folder / "x.yaml").read_text() == "the user's own\n"
    (folder / "x.yaml").unlink()
    folder.build("x.toml")
    (folder / "c.yaml").write_text("model: two\n")
    folder.build("x.toml")
    assert (folder / "x.yaml").read_text() == "model: two\n"
    folder.write(
        "two.toml",
        HEAD.replace('"x"', '"two"') + 'sources.s.file = "vae.safetensors"\n'
        '[[output]]\nname = "a"\nfile = "y.safetensors"\nconfig = "c.yaml"\n'
        '[[output]]\nname = "b"\nfile = "y.ckpt"\nconfig = "x.yaml"\n',
    )
    said = folder("build", "two.toml")
    assert said.code == 3 and "two outputs share `y.yaml`" in said.err


def test_prune_takes_no_link_along(folder: Folder) -> None:
    save_dirty(folder / "dirty.ckpt")
    (folder / "dirty.yaml").symlink_to(folder.path.parent / "own" / "id_rsa")
    assert folder("prune", "dirty.ckpt").code == 0
    assert (folder / "dirty-pruned.safetensors").exists() and not (folder / "dirty-pruned.yaml").exists()


def test_a_lock_is_a_claim(folder: Folder) -> None:
    """Lines taken out of a lock, or emptied, make it stale; digests that are none are refused."""
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    folder.build("x.toml")
    lock = folder / "x.lock.toml"
    good = lock.read_text(encoding="utf-8")
    assert folder("build", "x.toml", "--locked").code == 0
    parts = good.split("\n\n")
    for part in [p for p in parts if p.startswith("[") and not p.startswith("[tool]")]:
        lock.write_text(good.replace(part, ""), encoding="utf-8")
        said = folder("build", "x.toml", "--locked")
        assert said.code == 4, part
    sha256 = next(line for line in good.splitlines() if line.startswith("sha256"))
    lock.write_text(good.replace(sha256, 'sha256 = "../../own/precious"'), encoding="utf-8")
    said = folder("build", "x.toml")
    assert said.code == 4 and "Traceback" not in said.err


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners of files")
def test_a_store_that_others_may_write_to_is_not_believed(folder: Folder) -> None:
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    folder.build("x.toml")
    folder.store.chmod(0o777)
    assert "others may write to the store" in folder("plan", "x.toml").err
    said = folder("plan", "x.toml", "-q")
    assert said.code == 0 and "seen for the first time" in said.out
    assert folder.build("x.toml")["outputs"][0]["state"] == "unchanged"


def test_times_are_not_believed_where_that_is_asked_for(folder: Folder) -> None:
    """Bytes that change below the file system leave times as they were."""
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    folder.build("x.toml")
    path = folder / "vae.safetensors"
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    wary = Folder(folder.path, folder.store, {"CKPT_TRUST_STAT": "0"})
    said = wary("build", "x.toml", "--locked")
    assert said.code == 4


def test_inputs_are_never_outputs(folder: Folder) -> None:
    before = (folder / "vae.safetensors").read_bytes()
    said = folder("new", "vae.safetensors", "-o", "vae.safetensors", "--force")
    assert said.code == 7 and (folder / "vae.safetensors").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_being_terminated_is_as_clean_as_ctrl_c(folder: Folder) -> None:
    code = (
        "import os, signal, sys\nfrom builder.cli import main\nimport builder.cli.plan as plan\n"
        "from builder.workspace import Workspace\nold = Workspace.recipe\n"
        "def recipe(self, path):\n    os.kill(os.getpid(), signal.SIGTERM)\n    return old(self, path)\n"
        "Workspace.recipe = recipe\nmain(['plan', 'x.toml'])\n"
    )
    folder.write("x.toml", HEAD + 'sources.s.file = "vae.safetensors"\n')
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder.path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **folder.variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (128 + signal.SIGTERM, "error: terminated")

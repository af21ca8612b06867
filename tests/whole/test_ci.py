"""What CI runs of ours, as it is written: the action's steps, the hooks, the image."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.help.building import ROOT, Folder, save_dirty
from tests.matrix.__main__ import PYTHONS

yaml = pytest.importorskip("yaml")
EXPRESSION = re.compile(r"\$\{\{ *(.+?) *\}\}")
COMMAND = re.compile(r"^::(?!stop-commands|[0-9a-f]{32}::)(.*)$", re.MULTILINE)


def tool(name: str) -> str:
    """A program that is installed beside this Python, or on the path; skips the test where it is not."""
    found = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    return found or pytest.skip(f"{name} is not installed")


class Runner:
    """The composite action's steps in their order, in a folder, with what a runner gives them."""

    def __init__(self, folder: Folder, temp: Path) -> None:
        self.action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
        self.folder, self.temp = folder, temp
        self.temp.mkdir()
        self.steps: dict[str, dict[str, str]] = {"cache": {}}
        self.log = ""
        self.environment: dict[str, str] = {}

    def run(self, inputs: Mapping[str, str], *, skip: frozenset[str] = frozenset()) -> int:
        """Run the steps that are shell until one fails; its exit code."""
        given = {n: str(i.get("default", "")) for n, i in self.action["inputs"].items()} | dict(inputs)
        for step in self.action["runs"]["steps"]:
            if "run" in step and step["id"] not in skip and (code := self._step(step, given)):
                return code
        return 0

    def value(self, expression: str, inputs: Mapping[str, str]) -> str:
        """What `${{ … }}` stands for in a text."""

        def found(match: re.Match[str]) -> str:
            said, _, otherwise = match[1].partition(" || ")
            kind, *names = said.split(".")
            held = inputs.get(names[0]) if kind == "inputs" else self.steps[names[0]].get(names[2], "")
            return held or otherwise.strip("'")

        return EXPRESSION.sub(found, expression)

    def outputs(self) -> dict[str, str]:
        """What the action gives to the workflow."""
        return {n: self.value(o["value"], {}) for n, o in self.action["outputs"].items()}

    def _step(self, step: Mapping[str, Any], inputs: Mapping[str, str]) -> int:
        assert step["shell"] == "bash" and "${{" not in step["run"], "an input is never part of a script"
        files = {
            n: self.temp / f"{n}-{step['id']}" for n in ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_STEP_SUMMARY")
        }
        for file in files.values():
            file.touch()
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("GITHUB_", "CKPT_"))},
            **{k: v for k, v in self.folder.variables.items() if k != "CKPT_STORE"},
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "GITHUB_ACTION_PATH": str(ROOT),
            "RUNNER_TEMP": str(self.temp),
            "RUNNER_OS": "Linux",
            **{n: str(f) for n, f in files.items()},
            **self.environment,
            **{n: self.value(v, inputs) for n, v in step.get("env", {}).items()},
        }
        # As a runner does: `bash --noprofile --norc -eo pipefail {0}`.
        script = self.temp / f"{step['id']}.sh"
        script.write_text(step["run"], encoding="utf-8")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
            cwd=self.folder.path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        self.log += done.stdout + done.stderr
        self.steps[step["id"]] = _told(files["GITHUB_OUTPUT"])
        self.environment |= _told(files["GITHUB_ENV"])
        return done.returncode


def _told(file: Path) -> dict[str, str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """With a recipe that is built, its lock beside it, and this very Python in place of an installed one."""
    made = Runner(Folder.below(tmp_path).tiny(), tmp_path / "runner")
    assert made.folder("build", "tiny.toml").code == 0
    (made.folder / "tiny.safetensors").unlink()
    made.steps["install"] = {"python": sys.executable}
    made.environment["PYTHONPATH"] = str(ROOT)
    return made


INSTALLED = frozenset({"install"})


def test_the_action_builds_what_the_lock_says(runner: Runner) -> None:
    assert runner.run({"recipe": "tiny.toml\n"}, skip=INSTALLED) == 0, runner.log
    data, said = (runner.folder / "tiny.safetensors").read_bytes(), runner.outputs()
    assert said["sha256"] == hashlib.sha256(data).hexdigest() and len(said["tensor-digest"]) == 64
    (only,) = json.loads(said["outputs"])
    assert (only["path"], only["sha256"], said["cache-hit"]) == ("tiny.safetensors", said["sha256"], "false")
    assert said["sha256"] in (runner.temp / "GITHUB_STEP_SUMMARY-build").read_text()
    store = Path(runner.steps["key"]["store"])
    assert store.is_relative_to(runner.temp) and list(store.glob("blobs/*/*")), "what is cached"


def test_the_key_of_the_cache_is_that_of_the_locks(runner: Runner) -> None:
    def key() -> str:
        assert runner.run({"recipe": "tiny.toml"}, skip=frozenset({"install", "build"})) == 0
        found = runner.steps["key"]
        assert found["key"].startswith(found["restore"])
        return found["key"]

    first = key()
    recipe, lock = runner.folder / "tiny.toml", runner.folder / "tiny.lock.toml"
    recipe.write_text(recipe.read_text() + "# a comment\n")
    assert key() == first
    lock.write_text(lock.read_text() + "# another\n")
    second = key()
    lock.unlink()
    assert len({first, second, key()}) == 3


def test_a_lock_that_would_change_fails_where_the_recipe_is_marked(runner: Runner) -> None:
    recipe = runner.folder / "tiny.toml"
    recipe.write_text(recipe.read_text().replace('name = "tiny"', 'name = "tiny"\ndescription = "new"'))
    assert runner.run({"recipe": "tiny.toml"}, skip=INSTALLED) == 4
    (mark,) = COMMAND.findall(runner.log)
    assert mark.startswith("error file=tiny.toml::") and "lock" in mark
    assert not (runner.folder / "tiny.safetensors").exists() and "sha256" not in runner.steps["build"]
    assert runner.run({"recipe": "tiny.toml", "locked": "false"}, skip=INSTALLED) == 0, runner.log


def test_a_mistake_is_marked_at_its_line(runner: Runner) -> None:
    recipe = runner.folder / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("fixes =", "fixs ="))
    assert runner.run({"recipe": "tiny.toml"}, skip=INSTALLED) == 3
    (mark,) = COMMAND.findall(runner.log)
    assert mark == "error file=tiny.toml,line=4,col=1::unknown key `fixs`%0Ahint: did you mean `fixes`?"
    assert "hint: did you mean `fixes`?\n" in runner.log


def test_nothing_that_is_said_is_a_command_to_the_runner(runner: Runner) -> None:
    """It is one line each, and lies between a mark that nobody can know before and that mark."""
    recipe = runner.folder / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("fixes =", '"\\n::add-path::/tmp\\u001b[1m" ='))
    assert runner.run({"recipe": "tiny.toml"}, skip=INSTALLED) == 3
    assert runner.run({"recipe": "tiny.toml", "args": "'--no\n::add-path::/tmp'"}, skip=INSTALLED) == 2
    assert runner.log.count("add-path") > 2 and "\x1b" not in runner.log
    outside = re.sub(r"^::stop-commands::([0-9a-f]{32})\n.*?^::\1::$", "", runner.log, flags=re.M | re.S)
    commands = [line for line in outside.splitlines() if line.startswith("::")]
    assert [line.partition(",")[0] for line in commands[:1]] == ["::error file=tiny.toml"]
    assert len(commands) == 2 and commands[1].startswith("::error::No such option '--no\\n::add-path")


def test_words_of_a_workflow_are_no_code(runner: Runner) -> None:
    (runner.folder / "$(touch x).toml").write_text((runner.folder / "tiny.toml").read_text())
    inputs = {"recipe": "$(touch x).toml", "locked": "false", "args": "--threads '2'"}
    assert runner.run(inputs, skip=INSTALLED) == 0, runner.log
    assert not (runner.folder / "x").exists()
    assert runner.run({"recipe": "tiny.toml", "args": "--threads 2; touch x"}, skip=INSTALLED) == 2
    assert not (runner.folder / "x").exists()


def test_several_recipes(runner: Runner) -> None:
    """All are built, though one fails."""
    tiny = (runner.folder / "tiny.toml").read_text()
    runner.folder.write("other.toml", tiny.replace('"tiny"', '"other"', 1))
    inputs = {"recipe": "missing.toml\nother.toml\n\n tiny.toml\n", "locked": "false"}
    assert runner.run(inputs, skip=INSTALLED) == 1
    assert "error: there is no recipe `missing.toml`" in runner.log
    assert runner.run({**inputs, "recipe": "other.toml\ntiny.toml"}, skip=INSTALLED) == 0
    names = [o["name"] for o in json.loads(runner.outputs()["outputs"])]
    assert names == ["other", "tiny"]
    runner.folder.write("other.toml", tiny.replace("dirty.ckpt", "gone.ckpt"))
    assert runner.run({**inputs, "recipe": "other.toml\ntiny.toml"}, skip=INSTALLED) == 5
    assert [o["name"] for o in json.loads(runner.outputs()["outputs"])] == ["tiny"]
    assert any(mark.startswith("error file=other.toml") for mark in COMMAND.findall(runner.log))


def test_what_the_action_installs(runner: Runner, tmp_path: Path) -> None:
    """With a Python that notes what it is asked for."""
    notes = tmp_path / "notes"
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\necho "$@" >>{notes}\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
    )
    fake.chmod(0o755)
    runner.environment["PATH"] = os.pathsep.join((str(fake.parent), os.environ["PATH"]))
    for version, torch, said in (
        ("", "torch", ["install --quiet torch", f"install --quiet {ROOT}"]),
        (
            "0.1.0",
            "torch==2.13.0 --index-url x",
            ["install --quiet torch==2.13.0 --index-url x", "ckpt-build==0.1.0"],
        ),
    ):
        notes.unlink(missing_ok=True)
        inputs = {"recipe": "tiny.toml", "version": version, "torch": torch}
        assert runner.run(inputs, skip=frozenset({"key", "build"})) == 0, runner.log
        told = notes.read_text().splitlines()
        assert told[0].startswith("-m venv ") and len(told) == 3
        assert all(line.endswith(end) for line, end in zip(told[1:], said, strict=True)), told
        assert runner.steps["install"]["python"] == str(runner.temp / "ckpt-venv" / "bin" / "python")


def test_every_input_and_output_is_used_and_told_of() -> None:
    text, document = (ROOT / "action.yml").read_text(), (ROOT / "docs" / "ci.md").read_text()
    action = yaml.safe_load(text)
    for name in action["inputs"]:
        assert f"inputs.{name}" in text and f"| `{name}` |" in document, name
    for name in action["outputs"]:
        assert f"| `{name}` |" in document, name


def test_actions_of_others_are_pinned_alike_everywhere() -> None:
    """By commits, whose release is said; the workflow tries the Pythons of the matrix."""
    workflow = ROOT / ".github" / "workflows" / "test.yml"
    uses = [
        line.partition("uses: ")[2]
        for file in (workflow, ROOT / "action.yml")
        for line in file.read_text(encoding="utf-8").splitlines()
        if "uses: " in line and not line.endswith("./")
    ]
    assert len(uses) > 4 and all(re.fullmatch(r"actions/\w[\w-]+@[0-9a-f]{40} # v[\d.]+", u) for u in uses)
    assert len(set(uses)) == len({u.partition("@")[0] for u in uses}) == 3
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    assert jobs["matrix"]["strategy"]["matrix"]["python"] == list(PYTHONS)


# ── the hooks ──


@pytest.fixture
def repository(tmp_path: Path) -> Folder:
    """A repository with a recipe and its lock, some of which is committed."""
    tool("git")
    made = Folder.below(tmp_path).tiny()
    assert made("lock", "tiny.toml").code == 0
    made.write("pyproject.toml", '[project]\nname = "x"\n')
    git(made, "init", "-q")
    git(made, "add", "tiny.toml", "tiny.lock.toml", "dirty.ckpt", "pyproject.toml")
    git(made, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    return made


def git(folder: Folder, *args: str) -> str:
    command = ["git", "-C", str(folder.path), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_lock_of_another_recipe_is_refused(repository: Folder) -> None:
    every = ("tiny.toml", "tiny.lock.toml", "pyproject.toml")
    assert repository("hook", "lock-check", *every) == (0, "", "")
    recipe, lock = repository / "tiny.toml", repository / "tiny.lock.toml"
    text = recipe.read_text()
    recipe.write_text("# a comment\n" + text)
    assert repository("hook", "lock-check", *every).code == 0
    recipe.write_text(text + "sources.more.file = 'x.ckpt'\ncomponents.CLIP-tiny = 'more'\n")
    for file in ("tiny.toml", "tiny.lock.toml"):
        said = repository("hook", "lock-check", file)
        assert said.code == 4 and "the lock is stale" in said.err
        assert "source `more`: not pinned" in said.err and "`ckpt lock tiny.toml` writes it" in said.err
    recipe.write_text(text)
    lock.write_text(lock.read_text().replace("profile = 1", "profile = 0"))
    assert "numeric profile: `0` became `1`" in repository("hook", "lock-check", "tiny.toml").err
    lock.unlink()
    said = repository("hook", "lock-check", *every)
    assert said.code == 4 and "there is no lock `tiny.lock.toml`" in said.err


def test_a_recipe_with_a_mistake_is_refused(repository: Folder) -> None:
    every = ("tiny.toml", "tiny.lock.toml", "pyproject.toml")
    assert repository("hook", "schema", *every) == (0, "", "")
    recipe = repository / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("fixes", "fixs"))
    repository.write("other.toml", "format = 1\nname =\n")
    repository.write("deep.toml", "format = " + "[" * 2000)
    said = repository("hook", "schema", *every, "other.toml", "deep.toml")
    assert "nested too deeply" in said.err
    assert said.code == 3 and "unknown key `fixs`" in said.err and "other.toml:2" in said.err


def test_a_pickle_that_is_new_is_refused(repository: Folder) -> None:
    save_dirty(repository / "new.ckpt")
    save_dirty(repository / "renamed.safetensors.txt")
    shutil.copy(repository / "new.ckpt", repository / "renamed.dat")
    (repository / "old").mkdir()
    (repository / "old" / "p.bin").write_bytes(b"\x80\x04}.")
    (repository / "old" / "text.PKL").write_bytes(b"(lp0\n.")
    (repository / "archive.zip").write_bytes(b"PK\5\6" + bytes(18))
    pickles = ["new.ckpt", "renamed.dat", "old/p.bin", "old/text.PKL"]
    names = [*pickles, "archive.zip", "vae.safetensors", "dirty.ckpt"]
    assert repository("hook", "no-new-pickles", *names).code == 0, "nothing is staged yet"
    git(repository, "add", *names)
    said = repository("hook", "no-new-pickles", *names)
    assert said.code == 2
    assert re.findall(r"`(\S+)` is a new pickle", said.err) == pickles
    save_dirty(repository / "a b.ckpt")
    git(repository, "add", "a b.ckpt")
    hint = "hint: `ckpt convert 'a b.ckpt' -o 'a b.safetensors'` keeps its tensors and no code"
    assert hint in repository("hook", "no-new-pickles", "a b.ckpt").err
    git(repository, "rm", "-qf", "--cached", "a b.ckpt")
    git(repository, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "second")
    assert repository("hook", "no-new-pickles", *names).code == 0
    between = {"PRE_COMMIT_FROM_REF": "HEAD~1", "PRE_COMMIT_TO_REF": "HEAD"}
    said = Folder(repository.path, repository.store, between)("hook", "no-new-pickles", *names)
    assert said.code == 2 and said.err.count("is a new pickle") == len(pickles)
    (repository.path.parent / "x").touch()
    outside = Folder(repository.path.parent, repository.store)("hook", "no-new-pickles", "x")
    assert outside.code == 2 and "git does not say what is added" in outside.err


@pytest.mark.slow
def test_pre_commit_runs_them(repository: Folder, tmp_path: Path) -> None:
    """With `language: system`, so that it takes the `ckpt` that is tested."""
    pre_commit = tool("pre-commit")
    home = tmp_path / "hooks"
    home.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", home)
    ckpt = tmp_path / "bin" / "ckpt"
    ckpt.parent.mkdir()
    ckpt.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m ckpt_build "$@"\n')
    ckpt.chmod(0o755)
    theirs = Folder(home, repository.store)
    git(theirs, "init", "-q")
    git(theirs, "add", ".")
    git(theirs, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "hooks")
    hooks = [h["id"] for h in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())]
    used = [{"id": h, "language": "system"} for h in hooks]
    rev = git(theirs, "rev-parse", "HEAD").strip()
    config = {"repos": [{"repo": str(home), "rev": rev, "hooks": used}]}
    repository.write(".pre-commit-config.yaml", yaml.safe_dump(config))
    git(repository, "add", ".pre-commit-config.yaml")
    variables = {**os.environ, **repository.variables, "PRE_COMMIT_HOME": str(tmp_path / "cache")}
    variables["PATH"] = os.pathsep.join((str(ckpt.parent), os.environ["PATH"]))

    def run() -> subprocess.CompletedProcess[str]:
        command = [pre_commit, "run", "--all-files", "--color=never"]
        return subprocess.run(
            command, cwd=repository.path, env=variables, capture_output=True, text=True, check=False
        )

    done = run()
    assert done.returncode == 0 and done.stdout.count("Passed") == len(hooks), done.stdout + done.stderr
    recipe = repository / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("dirty.ckpt", "new.ckpt").replace("fixes", "fixs"))
    save_dirty(repository / "new.ckpt")
    git(repository, "add", ".")
    done = run()
    assert done.returncode == 1 and done.stdout.count("Failed") == len(hooks), done.stdout + done.stderr
    assert "unknown key `fixs`" in done.stdout and "`new.ckpt` is a new pickle" in done.stdout


def test_a_hook_is_of_files_that_are_there(tmp_path: Path) -> None:
    folder = Folder.below(tmp_path)
    for hook in ("lock-check", "schema"):
        said = folder("hook", hook, "recipe.tml")
        assert (said.code, "there is no `recipe.tml`" in said.err) == (2, True)
        said = folder("hook", hook, ".")
        assert (said.code, "`ckpt lock --check .` checks all recipes in it" in said.err) == (2, True)


def test_the_hooks_are_those_of_the_command(tmp_path: Path) -> None:
    folder = Folder.below(tmp_path)
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    document = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    for hook in hooks:
        assert hook["entry"].split()[:2] == ["ckpt", "hook"] and f"`{hook['id']}`" in document
        said = folder(*hook["entry"].split()[1:])
        assert said.code == 0 or "git does not say" in said.err


# ── the image ──


def test_the_image() -> None:
    """What holds of it without building it."""
    path = ROOT / "Dockerfile"
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    said: dict[str, list[str]] = {}
    for word, rest in lines:
        said.setdefault(word, []).append(rest)
    assert said["FROM"][0].endswith("-slim") and said["VOLUME"] == ["/store"]
    assert "CKPT_STORE=/store" in said["ENV"][0] and int(said["USER"][-1]) > 0
    assert [w for w, _ in lines][-2:] == ["ENTRYPOINT", "CMD"] and lines[-3][0] == "USER"
    packages = {line.split()[0] for line in said["COPY"] if "/" not in line.split()[0]}
    assert {"builder", "ckpt_build", "components_db", "pyproject.toml"} <= packages
    assert all((ROOT / name).exists() for line in said["COPY"] for name in line.split()[:-1])


def test_the_image_has_nothing_that_hadolint_warns_of() -> None:
    done = subprocess.run(
        [tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout

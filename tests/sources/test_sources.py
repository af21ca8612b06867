"""Finding sources on this machine, and refusing what is not what was pinned."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder.base.errors import ExitCode, FetchError, Problem, SourceError, render
from builder.base.progress import Reporter
from builder.formats.write_safetensors import write
from builder.sources.find import Found, find_source, model_folders, verify_source
from builder.sources.net.hosts import hugging_face_cache
from builder.store import Store
from builder.store.memory import RACY
from builder.tensors.lazy import DType, MemoryTensor

ABC = b"abc"
SHA = hashlib.sha256(ABC).hexdigest()
OTHER = hashlib.sha256(b"xyz").hexdigest()


@dataclass(frozen=True)
class Spec:
    name: str = "anything"
    file: str | None = "Anything.ckpt"
    sha256: str | None = None
    size: int | None = None
    urls: tuple[str, ...] = ()


class Listener(Reporter):
    """Hears of warnings, and counts what is read; `then` happens at the first byte read."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.warnings: list[Problem] = []
        self.read = 0
        self.then = then

    def advance(self, task: str, count: int) -> None:
        if not self.read:
            self.then()
        self.read += count

    def warn(self, problem: Problem) -> None:
        self.warnings.append(problem)


@dataclass
class Place:
    """A recipe's folder, a store, two folders of models and an empty Hugging Face cache."""

    root: Path
    store: Store
    listener: Listener

    def write(self, path: str, data: bytes = ABC) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file

    def hashed(self, path: Path, sha256: str) -> None:
        """Make the store know a file's digest, as if it had been hashed when its times had settled."""
        stat = path.stat()
        assert self.store.memory.remember(stat, sha256, max(stat.st_ctime_ns, stat.st_mtime_ns) + RACY)

    def find(self, spec: Spec, hashing: bool = True) -> Found:
        return find_source(
            spec,
            folder=self.root / "recipes",
            model_folders=[self.root / "m1", self.root / "m2"],
            store=self.store,
            hashing=hashing,
            reporter=self.listener,
        )

    def missing(self, spec: Spec) -> str:
        with pytest.raises(FetchError) as caught:
            self.find(spec)
        assert caught.value.exit_code == ExitCode.FETCH
        return render(caught.value.problems[0]).replace(str(self.root), "ROOT")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return Place(tmp_path, Store(tmp_path / "store"), Listener())


# Where it is looked for.


def test_beside_the_recipe_comes_first(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt", b"xyz")
    place.write("m1/Anything.ckpt")
    for spec in (Spec(), Spec(sha256=SHA), Spec(sha256=SHA, size=3)):
        assert place.find(spec) == Found(file, None, 3, "beside the recipe")
    assert place.listener.read == 0
    place.hashed(file, OTHER)
    assert place.find(Spec()).sha256 == OTHER


def test_a_path_beside_the_recipe_may_lead_anywhere(place: Place) -> None:
    file = place.write("elsewhere/x.ckpt")
    (place.root / "recipes").mkdir()
    assert place.find(Spec(file="../elsewhere/x.ckpt")).path.samefile(file)
    assert place.find(Spec(file=str(file))).path == file


@pytest.mark.parametrize("at", ["m1/Anything.ckpt", "m2/Anything.ckpt", "m2/deep/er/Anything.ckpt"])
def test_models_are_found_by_name(place: Place, at: str) -> None:
    file = place.write(at)
    place.write("m1/other.ckpt")
    for file_name in ("Anything.ckpt", "models/Anything.ckpt"):
        assert place.find(Spec(file=file_name)) == Found(file, None, 3, "folder of models, by name")
        found = place.find(Spec(file=file_name, sha256=SHA))
        assert found == Found(file, SHA, 3, "folder of models, by name")


def test_the_same_path_below_a_folder_is_preferred(place: Place) -> None:
    place.write("m1/a/x.ckpt")
    file = place.write("m2/b/x.ckpt")
    assert place.find(Spec(file="b/x.ckpt")).path == file


def test_a_pin_chooses_among_files_of_one_name(place: Place) -> None:
    wrong = place.write("m1/Anything.ckpt", b"xyz")
    place.write("m1/sub/Anything.ckpt", b"too long")
    right = place.write("m2/Anything.ckpt")
    assert place.find(Spec()).path == wrong
    assert place.find(Spec(sha256=SHA)) == Found(right, SHA, 3, "folder of models, by name")
    assert place.find(Spec(sha256=SHA, size=3)).path == right
    assert place.find(Spec(sha256=SHA, size=3), hashing=False) == Found(
        wrong, None, 3, "folder of models, by name"
    )
    place.hashed(wrong, OTHER)
    assert place.find(Spec(sha256=SHA, size=3), hashing=False).path == right


def test_a_file_beside_the_recipe_has_the_size_that_is_pinned(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt")
    assert place.find(Spec(size=3)).path == file
    with pytest.raises(SourceError) as error:
        place.find(Spec(size=4))
    assert error.value.problems[0].evidence == ("pinned: 4 bytes", "found:  3 bytes")


def test_models_are_found_by_size_and_digest(place: Place) -> None:
    place.write("m1/a.ckpt", b"xyz")
    place.write("m1/b.ckpt", b"four")
    file = place.write("m2/renamed.ckpt")
    found = place.find(Spec(sha256=SHA, size=3))
    assert found == Found(file, SHA, 3, "folder of models, by digest")
    assert place.listener.read == 6  # the file of another size was not
    assert place.find(Spec(file=None, sha256=SHA, size=3)).path == file


def test_remembered_digests_spare_reading(place: Place) -> None:
    for n in range(5):
        place.write(f"m1/{n}.ckpt", b"xyz")
    file = place.write("m2/renamed.ckpt")
    assert "ROOT/m2" in place.missing(Spec(sha256=SHA))  # without a size, nothing is read
    place.hashed(file, SHA)
    assert place.find(Spec(sha256=SHA)).path == file
    assert place.find(Spec(sha256=SHA, size=3)).path == file
    assert place.listener.read == 0


def test_finished_downloads_are_found_by_digest(place: Place) -> None:
    partial = place.store.partial_path("x")
    partial.write_bytes(ABC)
    kept = place.store.keep_download(partial, SHA)
    assert place.find(Spec(sha256=SHA, size=3)) == Found(kept, SHA, 3, "download")
    assert place.find(Spec(file=None, sha256=SHA)).path == kept
    assert place.listener.read == 0


def test_a_damaged_download_is_not_taken(place: Place) -> None:
    partial = place.store.partial_path("x")
    partial.write_bytes(ABC)
    kept = place.store.keep_download(partial, SHA)
    kept.chmod(0o644)
    kept.write_bytes(b"xyz")
    assert f"it has the SHA-256 {OTHER}" in place.missing(Spec(sha256=SHA))


def test_the_hugging_face_cache_is_found_by_digest(place: Place) -> None:
    place.write("hub/models--a--b/blobs/0123", b"xyz")
    blob = place.write(f"hub/models--a--b/blobs/{SHA}")
    assert place.find(Spec(sha256=SHA)) == Found(blob, SHA, 3, "Hugging Face cache")
    place.write(f"hub/models--a--b/blobs/{OTHER}", b"ab")
    assert "instead" not in place.missing(Spec(sha256=OTHER))
    assert "has 2 bytes instead of 3" in place.missing(Spec(sha256=OTHER, size=3))


def test_where_the_hugging_face_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert hugging_face_cache() == Path("/home/me/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert hugging_face_cache() == Path("/cache/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert hugging_face_cache() == Path("/home/me/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/hub")
    assert hugging_face_cache() == Path("/hub")


def test_folders_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_MODELS", raising=False)
    assert model_folders() == ()
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CKPT_MODELS", f"/a{os.pathsep}{os.pathsep}~/b")
    assert model_folders() == (Path("/a"), Path("/home/me/b"))
    monkeypatch.setenv("CKPT_MODELS", "~no-such-user/b")
    assert model_folders() == (Path("~no-such-user/b"),)


# Folders as they are.


def test_links_are_followed_and_loops_are_not(place: Place) -> None:
    file = place.write("disk/models/x.ckpt")
    (place.root / "m1").mkdir()
    (place.root / "m1/disk").symlink_to(place.root / "disk")
    (place.root / "disk/models/up").symlink_to(place.root / "disk")
    (place.root / "disk/models/self").symlink_to("self")
    (place.root / "m1/gone.ckpt").symlink_to("nowhere")
    os.mkfifo(place.root / "m1/pipe.ckpt")
    found = place.find(Spec(file="x.ckpt", sha256=SHA, size=3))
    assert found.path.samefile(file)
    assert found.path == place.root / "m1/disk/models/x.ckpt"
    for name in ("gone.ckpt", "pipe.ckpt", "self", "models"):
        place.missing(Spec(file=name))


def test_hidden_files_are_left_alone(place: Place) -> None:
    place.write("m1/.cache/Anything.ckpt")
    place.write("m1/.Anything.ckpt")
    place.missing(Spec(sha256=SHA, size=3))
    place.missing(Spec(file=".Anything.ckpt.part"))


def test_a_search_is_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write("m1/" + "d/" * 17 + "Anything.ckpt")
    place.missing(Spec())
    file = place.write("m1/" + "d/" * 15 + "Anything.ckpt")
    assert place.find(Spec()).path == file
    monkeypatch.setattr("builder.sources.find.MAX_FILES", 2)
    for n in range(3):
        place.write(f"m1/a{n}")
    place.missing(Spec())
    assert "too many files" in place.listener.warnings[-1].fact


def test_a_search_does_not_leave_its_folders_by_name(place: Place) -> None:
    place.write("secret.ckpt")
    (place.root / "m1/sub").mkdir(parents=True)
    (place.root / "recipes").mkdir()
    assert (place.root / "m1" / "sub/../../secret.ckpt").exists()
    place.missing(Spec(file="sub/../../secret.ckpt"))


@pytest.mark.parametrize("name", ["x" * 300, "nul\0.ckpt", "", "."])
def test_a_name_that_no_file_can_have_is_nowhere_or_refused(place: Place, name: str) -> None:
    place.write("m1/Anything.ckpt")
    (place.root / "recipes").mkdir()
    with pytest.raises((FetchError, SourceError)):
        place.find(Spec(file=name))


def test_a_pipe_is_not_opened(place: Place) -> None:
    (place.root / "recipes").mkdir()
    os.mkfifo(place.root / "recipes/Anything.ckpt")
    place.missing(Spec())


def test_a_file_that_cannot_be_read_is_passed_over(place: Place) -> None:
    place.write("m1/Anything.ckpt", b'{"weight_map": {}}')
    file = place.write("m2/Anything.ckpt")
    assert place.find(Spec(sha256=SHA)).path == file
    place.listener = Listener(lambda: file.write_bytes(b"xyzzy"))
    assert "is refused: " in place.missing(Spec(sha256=SHA))


# What is said when it is nowhere.


def test_the_places_are_named(place: Place) -> None:
    place.write("m1/Anything.ckpt", b"xyz")
    place.write("m2/Anything.ckpt", b"four")
    assert place.missing(Spec(sha256=SHA, size=3, urls=("https://example.org/a",))) == (
        "error: the source `anything` is nowhere to be found\n"
        f"   = wanted: SHA-256 {SHA}\n"
        "   = beside the recipe: `ROOT/recipes/Anything.ckpt`\n"
        "   = in the folder of models `ROOT/m1`\n"
        "   = in the folder of models `ROOT/m2`\n"
        "   = among the store's downloads\n"
        "   = in the Hugging Face cache: `ROOT/hub`\n"
        "   = not `ROOT/m2/Anything.ckpt`: it has 4 bytes instead of 3\n"
        f"   = not `ROOT/m1/Anything.ckpt`: it has the SHA-256 {OTHER}\n"
        "hint: it can be had from https://example.org/a"
    )


def test_without_folders_the_setting_is_named(place: Place) -> None:
    with pytest.raises(FetchError) as caught:
        find_source(Spec(), folder=place.root, model_folders=(), store=place.store)
    [problem] = caught.value.problems
    assert problem.evidence[-1] == "in no folder of models: `CKPT_MODELS` is not set"
    assert problem.hint == "put the file there, or set `CKPT_MODELS` to the folder that holds it"


# Pins.


def test_a_source_is_held_to_its_pin(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt")
    found = place.find(Spec())
    assert verify_source(found, None, store=place.store).sha256 == SHA
    assert verify_source(found, SHA, store=place.store) == Found(file, SHA, 3, "beside the recipe")
    names = {SHA: "abc-v1.ckpt"}
    with pytest.raises(SourceError) as caught:
        verify_source(found, OTHER, store=place.store, known=names.get)
    assert caught.value.exit_code == ExitCode.SOURCE
    assert render(caught.value.problems[0]).replace(str(place.root), "ROOT") == (
        "error: `Anything.ckpt` is not what was pinned\n"
        "  --> ROOT/recipes/Anything.ckpt\n"
        f"   = pinned: {OTHER}\n"
        f"   = found:  {SHA} (`abc-v1.ckpt`)\n"
        "hint: get the file that was pinned, or pin this one if it is the one you mean"
    )


def test_a_source_is_hashed_once(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt")
    place.hashed(file, SHA)
    verify_source(place.find(Spec()), SHA, store=place.store, reporter=place.listener)
    assert place.listener.read == 0
    file.write_bytes(b"xyz")
    with pytest.raises(SourceError, match="not what was pinned"):
        verify_source(place.find(Spec()), SHA, store=place.store, reporter=place.listener)
    assert place.listener.read == 3


def test_a_source_that_changes_while_it_is_read_is_refused(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt")
    found = place.find(Spec())
    with pytest.raises(SourceError, match="changed while it was read"):
        verify_source(found, SHA, store=place.store, reporter=Listener(lambda: file.write_bytes(b"xyzzy")))
    assert place.store.remembered_sha256(file.stat()) is None


def test_a_source_that_is_gone_is_refused(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt")
    found = place.find(Spec())
    file.unlink()
    with pytest.raises(SourceError, match="cannot open"):
        verify_source(found, SHA, store=place.store)


# Sharded sets.


def sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    names = {}
    for n in (1, 2):
        shard = f"model-{n}.safetensors"
        write(folder / shard, {f"t{n}": MemoryTensor(DType.U8, (3,), bytes([n] * 3))}, durable=False)
        names[f"t{n}"] = shard
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return index


@pytest.mark.parametrize("whole", [True, False])
def test_a_sharded_set_is_pinned_by_all_its_shards(place: Place, whole: bool) -> None:
    index = sharded(place.root / "recipes/set")
    spec = Spec(file="set" if whole else "set/model.safetensors.index.json")
    found = place.find(spec)
    shards = sorted(index.parent.glob("*.safetensors"))
    assert found.size == sum(s.stat().st_size for s in shards)
    assert found.sha256 is None
    told = subprocess.run(
        "sha256sum *.safetensors | sha256sum", shell=True, cwd=index.parent, capture_output=True, text=True
    )
    sha256 = told.stdout.split()[0]
    assert verify_source(found, sha256, store=place.store).sha256 == sha256
    for shard in shards:
        place.hashed(shard, hashlib.sha256(shard.read_bytes()).hexdigest())
    assert place.find(spec).sha256 == sha256
    shards[1].write_bytes(shards[1].read_bytes()[:-1] + b"\xff")
    assert place.find(spec).sha256 is None
    with pytest.raises(SourceError, match="not what was pinned"):
        verify_source(found, sha256, store=place.store)


def test_what_poses_as_a_sharded_set_is_refused(place: Place) -> None:
    place.write("recipes/Anything.ckpt", b'{"error": "not found"}')
    with pytest.raises(SourceError, match="no checkpoint"):
        verify_source(place.find(Spec()), SHA, store=place.store)


def test_links_that_loop_are_no_files(place: Place) -> None:
    for folder in (place.root / "recipes", place.root / "m1"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "Anything.ckpt").symlink_to("Anything.ckpt")
        (folder / "there").symlink_to("back")
        (folder / "back").symlink_to("there")
    for spec in (Spec(), Spec(sha256=SHA), Spec(file="there/Anything.ckpt"), Spec(file="m" * 3000)):
        with pytest.raises(FetchError, match="nowhere to be found"):
            place.find(spec)

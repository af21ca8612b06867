"""Finding sources on this machine, and refusing what is not what was pinned."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from builder.base.errors import ExitCode, FetchError, Problem, SourceError, render
from builder.base.parallel import Cancelled
from builder.base.progress import Reporter
from builder.formats import open_checkpoint
from builder.formats.write_safetensors import write
from builder.models.catalog import load_catalog
from builder.sources.find import Found, find_source
from builder.sources.job import SourceJob
from builder.sources.net.hosts import hugging_face_cache
from builder.sources.opened import NotPinned, Sources
from builder.store import Store
from builder.tensors.lazy import DType, MemoryTensor
from builder.workspace import Settings
from tests.help.building import Folder, model, save


def checkpoint(data: bytes) -> bytes:
    """A safetensors file of one tensor."""
    header = json.dumps({"t": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}})
    return len(header).to_bytes(8, "little") + header.encode() + data


ABC, XYZ = checkpoint(b"abc"), checkpoint(b"xyz")
SIZE = len(ABC)
SHA = hashlib.sha256(ABC).hexdigest()
OTHER = hashlib.sha256(XYZ).hexdigest()


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
    listener: Listener = field(default_factory=Listener)
    catalogs: tuple[Path, ...] = ()

    def write(self, path: str, data: bytes = ABC) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file

    def hashed(self, path: Path, sha256: str) -> None:
        """Make the store know a file's digest, as if it had been hashed when its times had settled."""
        assert self.store.memory.remember(path.stat(), sha256, seen=None)

    @property
    def folders(self) -> list[Path]:
        return [self.root / "m1", self.root / "m2"]

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_HUB_CACHE": str(self.root / "hub")}

    def find(self, spec: Spec) -> Found:
        """What a source is taken to be, without any file being hashed."""
        read = self.listener.read
        found = find_source(
            spec,
            folder=self.root / "recipes",
            model_folders=self.folders,
            store=self.store,
            environment=self.environment,
            reporter=self.listener,
        )
        assert self.listener.read == read
        return found

    @contextmanager
    def sources(self, spec: Spec) -> Iterator[tuple[Sources, SourceJob]]:
        """The live side of one source, without a network."""
        folder = self.root / "recipes"
        job = SourceJob(
            "it", spec.name, spec.name, folder, spec.file, spec.sha256, spec.size, spec.urls, None, None
        )
        catalog = load_catalog(self.catalogs)
        with Sources(catalog, self.store, self.folders, None, self.listener, self.environment) as sources:
            yield sources, job

    def have(self, spec: Spec) -> Found:
        """What a source is once it was read, as a build does it: another file of the name is passed over."""
        with self.sources(spec) as (sources, job):
            if sources.find(job) is None:
                raise sources.missing(job)
            while True:
                try:
                    return sources.hash(job)
                except NotPinned as error:
                    if not sources.another(job, error.path):
                        raise

    def missing(self, spec: Spec) -> str:
        with pytest.raises(FetchError) as caught:
            self.find(spec)
        assert caught.value.exit_code == ExitCode.FETCH
        return render(caught.value.problems[0]).replace(str(self.root), "ROOT")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, Store(tmp_path / "store"))


# Where it is looked for.


def test_beside_the_recipe_comes_first(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt", XYZ)
    place.write("m1/Anything.ckpt")
    for spec in (Spec(), Spec(sha256=SHA), Spec(sha256=SHA, size=SIZE)):
        assert place.find(spec) == Found(file, None, SIZE, "beside the recipe")
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
    names = ("Anything.ckpt", "models/Anything.ckpt")
    for name in names:
        assert place.find(Spec(file=name)) == Found(file, None, SIZE, "folder of models, by name")
    for name in names:
        found = place.have(Spec(file=name, sha256=SHA))
        assert found == Found(file, SHA, SIZE, "folder of models, by name")


def test_the_same_path_below_a_folder_is_preferred(place: Place) -> None:
    place.write("m1/a/x.ckpt")
    file = place.write("m2/b/x.ckpt")
    assert place.find(Spec(file="b/x.ckpt")).path == file


def test_a_pin_chooses_among_files_of_one_name(place: Place) -> None:
    wrong = place.write("m1/Anything.ckpt", XYZ)
    place.write("m1/sub/Anything.ckpt", b"too long")
    right = place.write("m2/Anything.ckpt")
    assert place.find(Spec()).path == wrong
    for spec in (Spec(sha256=SHA), Spec(sha256=SHA, size=SIZE)):
        place.store = Store(place.root / f"store {spec.size}")
        assert place.find(spec) == Found(wrong, None, SIZE, "folder of models, by name")
        assert place.have(spec) == Found(right, SHA, SIZE, "folder of models, by name")
        assert place.find(spec) == Found(right, SHA, SIZE, "folder of models, by name"), "as is known now"


def test_a_file_beside_the_recipe_has_the_size_that_is_pinned(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt")
    assert place.find(Spec(size=SIZE)).path == file
    with pytest.raises(SourceError) as error:
        place.find(Spec(size=4))
    assert error.value.problems[0].evidence == ("pinned: 4 bytes", f"found:  {SIZE} bytes")


def test_models_are_found_by_size_and_digest(place: Place) -> None:
    place.write("m1/a.ckpt", XYZ)
    place.write("m1/b.ckpt", b"four")
    file = place.write("m2/renamed.ckpt")
    found = place.have(Spec(sha256=SHA, size=SIZE))
    assert found == Found(file, SHA, SIZE, "folder of models, by digest")
    assert place.listener.read == 2 * SIZE  # the file of another size was not
    assert place.find(Spec(file=None, sha256=SHA, size=SIZE)).path == file


def test_remembered_digests_spare_reading(place: Place) -> None:
    for n in range(5):
        place.write(f"m1/{n}.ckpt", XYZ)
    file = place.write("m2/renamed.ckpt")
    assert "ROOT/m2" in place.missing(Spec(sha256=SHA))  # without a size, nothing is read
    place.hashed(file, SHA)
    assert place.find(Spec(sha256=SHA)).path == file
    assert place.find(Spec(sha256=SHA, size=SIZE)).path == file
    assert place.listener.read == 0


def test_finished_downloads_are_found_by_digest(place: Place) -> None:
    partial = place.store.partial_path("x")
    partial.write_bytes(ABC)
    kept = place.store.keep_download(partial, SHA)
    assert place.find(Spec(sha256=SHA, size=SIZE)) == Found(kept, SHA, SIZE, "download")
    assert place.find(Spec(file=None, sha256=SHA)).path == kept
    assert place.listener.read == 0


def test_a_damaged_download_is_not_taken(place: Place) -> None:
    partial = place.store.partial_path("x")
    partial.write_bytes(ABC)
    kept = place.store.keep_download(partial, SHA)
    kept.chmod(0o644)
    kept.write_bytes(XYZ)
    with pytest.raises(SourceError, match="is not what was pinned"):
        place.have(Spec(sha256=SHA))
    assert f"it has the SHA-256 {OTHER}" in place.missing(Spec(sha256=SHA))


def test_the_hugging_face_cache_is_found_by_digest(place: Place) -> None:
    place.write("hub/models--a--b/blobs/0123", XYZ)
    blob = place.write(f"hub/models--a--b/blobs/{SHA}")
    assert place.have(Spec(sha256=SHA)) == Found(blob, SHA, SIZE, "Hugging Face cache")
    place.write(f"hub/models--a--b/blobs/{OTHER}", ABC)
    assert f"has {SIZE} bytes instead of 3" in place.missing(Spec(sha256=OTHER, size=3))
    with pytest.raises(SourceError, match="is not what was pinned"):
        place.have(Spec(sha256=OTHER))


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
    monkeypatch.setenv("HOME", "/home/me")

    def folders(**said: str) -> tuple[Path, ...]:
        return Settings.from_environment({"CKPT_STORE": "/s", **said}).models

    assert folders() == ()
    assert folders(CKPT_MODELS=f"/a{os.pathsep}{os.pathsep}~/b") == (Path("/a"), Path("/home/me/b"))
    assert folders(CKPT_MODELS="~no-such-user/b") == (Path("~no-such-user/b"),)


# Folders as they are.


def test_links_are_followed_and_loops_are_not(place: Place) -> None:
    file = place.write("disk/models/x.ckpt")
    (place.root / "m1").mkdir()
    (place.root / "m1/disk").symlink_to(place.root / "disk")
    (place.root / "disk/models/up").symlink_to(place.root / "disk")
    (place.root / "disk/models/self").symlink_to("self")
    (place.root / "m1/gone.ckpt").symlink_to("nowhere")
    os.mkfifo(place.root / "m1/pipe.ckpt")
    found = place.find(Spec(file="x.ckpt", sha256=SHA, size=SIZE))
    assert found.path.samefile(file)
    assert found.path == place.root / "m1/disk/models/x.ckpt"
    for name in ("gone.ckpt", "pipe.ckpt", "self", "models"):
        place.missing(Spec(file=name))


def test_hidden_files_are_left_alone(place: Place) -> None:
    place.write("m1/.cache/Anything.ckpt")
    place.write("m1/.Anything.ckpt")
    place.missing(Spec(sha256=SHA, size=SIZE))
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
    assert "it is refused: " in place.missing(Spec(sha256=SHA, size=4))


# What is said when it is nowhere.


def test_the_places_are_named(place: Place) -> None:
    place.hashed(place.write("m1/Anything.ckpt", XYZ), OTHER)
    place.write("m2/Anything.ckpt", b"four")
    assert place.missing(Spec(sha256=SHA, size=SIZE, urls=("https://example.org/a",))) == (
        "error: the source `anything` is nowhere to be found\n"
        f"   = wanted: SHA-256 {SHA}\n"
        "   = beside the recipe: `ROOT/recipes/Anything.ckpt`\n"
        "   = in the folder of models `ROOT/m1`\n"
        "   = in the folder of models `ROOT/m2`\n"
        "   = among the store's downloads\n"
        "   = in the Hugging Face cache: `ROOT/hub`\n"
        f"   = not `ROOT/m1/Anything.ckpt`: it has the SHA-256 {OTHER}\n"
        f"   = not `ROOT/m2/Anything.ckpt`: it has 4 bytes instead of {SIZE}\n"
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
    place.write("own/known/k.toml", f'[[file]]\nname = "abc-v1.ckpt"\nsha256 = "{SHA}"\n'.encode())
    place.catalogs = (place.root / "own",)
    for spec in (Spec(), Spec(sha256=SHA)):
        assert place.have(spec) == Found(file, SHA, SIZE, "beside the recipe")
    with pytest.raises(SourceError) as caught:
        place.have(Spec(sha256=OTHER))
    assert caught.value.exit_code == ExitCode.SOURCE
    assert render(caught.value.problems[0]).replace(str(place.root), "ROOT") == (
        "error: `Anything.ckpt` is not what was pinned\n"
        "  --> ROOT/recipes/Anything.ckpt\n"
        f"   = pinned: {OTHER}\n"
        f"   = found:  {SHA} (`abc-v1.ckpt`)\n"
        "hint: get the file that was pinned, or pin this one if it is the one you mean"
    )


def test_a_source_is_hashed_once(place: Place) -> None:
    """Also one that was made a moment ago: its times are given the time to settle."""
    file = place.write("recipes/Anything.ckpt")
    place.have(Spec(sha256=SHA))
    assert place.listener.read == SIZE
    place.have(Spec(sha256=SHA))
    assert place.listener.read == SIZE
    assert place.find(Spec()).sha256 == SHA
    file.write_bytes(XYZ)
    with pytest.raises(SourceError, match="not what was pinned"):
        place.have(Spec(sha256=SHA))
    assert place.listener.read == 2 * SIZE


def test_a_source_that_changes_while_it_is_read_is_refused(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt")
    place.listener = Listener(lambda: file.write_bytes(b"xyzzy"))
    with pytest.raises(SourceError, match="changed while it was read"):
        place.have(Spec(sha256=SHA))
    assert place.store.remembered_sha256(file.stat()) is None


def test_a_source_that_changes_after_it_was_hashed_is_refused(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt")
    with place.sources(Spec()) as (sources, job):
        sources.hash(job)
        sources.check_unchanged(job)
        file.write_bytes(XYZ)
        with pytest.raises(SourceError, match="the source `anything` changed while it was read"):
            sources.check_unchanged(job)


def test_what_is_hashed_is_what_is_read(place: Place) -> None:
    """A name may lead elsewhere at any moment: one open file is all that counts."""
    one, two = place.write("one"), place.write("two", XYZ)
    link = place.root / "recipes/Anything.ckpt"
    link.parent.mkdir()
    link.symlink_to(one)
    for spec in (Spec(), Spec(sha256=SHA)):
        with place.sources(spec) as (sources, job):
            opened = sources.open(job).checkpoint
            link.unlink()
            link.symlink_to(two)
            assert sources.hash(job).sha256 == SHA
            assert sources.remembered(job) == SHA
            assert opened["t"].tobytes() == b"abc"
            link.unlink()
            link.symlink_to(one)


def test_hashing_can_be_stopped(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt")
    stop = threading.Event()
    stop.set()
    with place.sources(Spec()) as (sources, job), pytest.raises(Cancelled):
        sources.hash(job, stop)
    assert place.listener.read == 0
    assert place.store.remembered_sha256(file.stat()) is None


def test_a_source_that_is_gone_is_refused(place: Place) -> None:
    file = place.write("recipes/Anything.ckpt")
    with place.sources(Spec(sha256=SHA)) as (sources, job):
        assert sources.find(job) is not None
        file.unlink()
        with pytest.raises(SourceError, match="cannot open"):
            sources.hash(job)


@pytest.mark.parametrize("content", ["another model", "no checkpoint"])
def test_a_namesake_does_not_keep_a_pinned_source_from_being_found(tmp_path: Path, content: str) -> None:
    """Also where the plan fails with it: it is of another kind, or nothing that can be read."""
    first, second = tmp_path / "m1/x.safetensors", tmp_path / "m2/x.safetensors"
    save(first, model("VAE-tiny"))
    if content == "no checkpoint":
        first.write_bytes(b"something else")
    sha256 = hashlib.sha256(save(second, model("SD-tiny")).read_bytes()).hexdigest()
    (tmp_path / "work").mkdir()
    models = os.pathsep.join([str(first.parent), str(second.parent)])
    folder = Folder(tmp_path / "work", tmp_path / "store", {"CKPT_MODELS": models})
    text = 'format = 1\nname = "tiny"\nbase = "NEW UNET-tiny"\ncomponents.UNET-tiny = "x"\n'
    folder.write("tiny.toml", f'{text}[sources.x]\nfile = "x.safetensors"\nsha256 = "{sha256}"\n')
    assert folder.states()["UNET-tiny of x"] == "make"
    assert folder.build()["outputs"][0]["state"] == "written"
    second.unlink()
    (folder / "tiny.safetensors").unlink()
    said = folder("build", "tiny.toml", "--offline")
    assert said.code == 5 and not (folder / "tiny.safetensors").exists()
    assert "`x` could not be fetched" in said.err, "the namesake is nobody's error"


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
    files = sorted(index.parent.iterdir())
    assert found.size == sum(f.stat().st_size for f in files)
    assert found.sha256 is None
    named = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    sha256 = hashlib.sha256(json.dumps(named, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    pinned = replace(spec, sha256=sha256)
    assert place.have(pinned).sha256 == sha256
    assert place.find(spec).sha256 == sha256
    # The metadata of the index go into what is made of the set: they are part of what is pinned.
    text = index.read_text()
    for path, data in ((index, text[:-1] + ', "metadata": {"a": "b"}}'), (files[1], "")):
        before = path.read_bytes()
        path.write_bytes(data.encode() or before[:-1] + b"\xff")
        assert place.find(spec).sha256 is None
        with pytest.raises(SourceError, match="not what was pinned"):
            place.have(pinned)
        path.write_bytes(before)


def test_names_of_shards_are_plain(place: Place) -> None:
    """A name with a newline could make half a set pass for the whole one."""
    index = sharded(place.root / "recipes/set")
    index.write_text(json.dumps({"weight_map": {"t1": "model-1.safetensors\nx"}}))
    with pytest.raises(SourceError, match="not a plain file name"):
        open_checkpoint(index)


def test_what_poses_as_a_sharded_set_is_refused(place: Place) -> None:
    place.write("recipes/Anything.ckpt", b'{"error": "not found"}')
    with pytest.raises(SourceError, match="no checkpoint"):
        place.have(Spec(sha256=SHA))


def test_links_that_loop_are_no_files(place: Place) -> None:
    for folder in (place.root / "recipes", place.root / "m1"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "Anything.ckpt").symlink_to("Anything.ckpt")
        (folder / "there").symlink_to("back")
        (folder / "back").symlink_to("there")
    for spec in (Spec(), Spec(sha256=SHA), Spec(file="there/Anything.ckpt"), Spec(file="m" * 3000)):
        with pytest.raises(FetchError, match="nowhere to be found"):
            place.find(spec)

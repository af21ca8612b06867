"""A store that machines share: what others made is used where it proves itself, and never ends a build."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from builder.sources.net import buckets
from builder.store import Made, Store
from builder.store.action_result import decode, encode
from builder.store.shared import FILE, Claim, Shared, Unavailable
from ckpt_build import Workspace
from tests.help.building import UNET, Folder, _environment, content, like, model, save
from tests.store.test_store import A, B, C, Listener, files, opened, put
from tests.store.test_store import content as values_of
from tests.store.test_store import model as tensors

# As protobuf's own library writes an `ActionResult`; the second with fields that a cache added.
HEAD = "12610a15636f6d706f6e656e742e7361666574656e736f727312480a40" + "6162" * 32
FIRST = HEAD + "10f48bb9e70c2a087b2261223a20317d"
SECOND = FIRST.replace("2a087b", "20072a087b") + "4a0a0a0831302e302e302e31"

# A merge that is kept on the way, and a model of it.
MERGE = """\
format = 1
name = "merged"
base = "a"
sources.a.file = "a.safetensors"
sources.b.file = "b.safetensors"
[steps.half]
op = "weighted-sum"
a = "a"
b = "b"
alpha = 0.5
store = true
[components]
UNET-tiny = "half"
"""


def test_records_are_results_as_the_protocol_has_them() -> None:
    assert encode(b'{"a": 1}', FILE, "ab" * 32, 3438167540).hex() == FIRST
    assert decode(bytes.fromhex(SECOND)) == b'{"a": 1}'


@pytest.mark.parametrize("raw", [b"", b"\xff" * 30, bytes.fromhex(FIRST)[:-1], b"{}", b"\x2b", b"\x80" * 9])
def test_what_is_no_record_is_none(raw: bytes) -> None:
    with pytest.raises(ValueError):
        decode(raw)


# -- stores


def shared_in(root: Path, *, writing: bool = True, reporter: Listener | None = None) -> Shared:
    return Shared(lambda: buckets.Folder(root), str(root), writing=writing, reporter=reporter or Listener())


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """A shared store, into which one machine has put what an action made."""
    with Store(tmp_path / "first", shared=shared_in(tmp_path / "far")) as store:
        store.share(A, put(store))
    return tmp_path / "far"


def rewrite(far: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Have every record say something else."""
    for path in (far / "ac").iterdir():
        record = json.loads(decode(path.read_bytes()))
        change(record)
        path.write_bytes(encode(json.dumps(record).encode(), FILE, "0" * 64, 1))


def test_what_one_made_another_has(far: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "second", shared=shared_in(far, writing=False)) as store:
        made = store.lookup(A, "UNET-v1")
        assert made is not None and store.holds(made.digest)
        with closing(opened(store, made)) as found:
            assert values_of(found.tensors) == values_of(tensors())
        assert store.blob_path(made.digest).exists()
        assert store.lookup(A, "VAE-v1") is None and store.lookup(B, "UNET-v1") is None
    assert len(files(far / "cas")) == 1 and len(files(far / "ac")) == 2


def test_names_of_blobs_are_their_digests(far: Path) -> None:
    for path in files(far / "cas"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_a_claim_is_never_what_an_action_made(far: Path, tmp_path: Path) -> None:
    """It is known while the same store is set, even where that is gone meanwhile, and not without it."""
    with Store(tmp_path / "second", shared=shared_in(far)) as store:
        assert store.lookup(A, "UNET-v1") is not None and store.is_claimed(A)
    far.rename(tmp_path / "moved")
    with Store(tmp_path / "second", shared=shared_in(far)) as store:
        assert store.lookup(A, "UNET-v1") is not None
    with Store(tmp_path / "second", shared=shared_in(tmp_path / "other")) as store:
        assert store.lookup(A, "UNET-v1") is None
    with Store(tmp_path / "second") as store:
        assert store.lookup(A, "UNET-v1") is None


def test_nothing_is_written_unless_that_is_asked_for(tmp_path: Path) -> None:
    with Store(tmp_path / "first", shared=shared_in(tmp_path / "far", writing=False)) as store:
        store.share(A, put(store))
    assert not (tmp_path / "far").exists()


def test_bytes_known_by_their_digest_need_nobodys_word(far: Path, tmp_path: Path) -> None:
    """What this machine made itself, and has no more, comes from there: its digest proves it."""
    with Store(tmp_path / "first", shared=shared_in(far)) as store:
        made = store.lookup(A, "UNET-v1")
        assert made is not None and not store.is_claimed(A)
        store.blob_path(made.digest).unlink()
        with closing(opened(store, made)) as found:
            assert values_of(found.tensors) == values_of(tensors())


LIES = {
    "another blob": lambda far: [p.write_bytes(os.urandom(p.stat().st_size)) for p in files(far / "cas")],
    "a flipped bit": lambda far: [
        p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])) for p in files(far / "cas")
    ],
    "cut short": lambda far: [p.write_bytes(p.read_bytes()[:-9]) for p in files(far / "cas")],
    "too long": lambda far: [p.write_bytes(p.read_bytes() + b"x" * 9) for p in files(far / "cas")],
    "empty": lambda far: [p.write_bytes(b"") for p in files(far / "cas")],
    "another size": lambda far: rewrite(far, lambda r: r.update(size=r["size"] - 1)),
    "a size without end": lambda far: rewrite(far, lambda r: r.update(size=1 << 62, bytes=1 << 62)),
    "another component": lambda far: rewrite(far, lambda r: r.update(blake3=B)),
    "another number of tensors": lambda far: rewrite(far, lambda r: r.update(tensors=r["tensors"] + 1)),
    "another digest": lambda far: rewrite(far, lambda r: r.update(sha256=B)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_noticed_and_nothing_comes_of_it(lie: str, far: Path, tmp_path: Path) -> None:
    LIES[lie](far)
    heard = Listener()
    with Store(tmp_path / "second", shared=shared_in(far, reporter=heard), reporter=heard) as store:
        made = store.lookup(A, "UNET-v1")
        assert made is not None and store.open(made.digest) is None
        assert not store.holds(made.digest)
        assert not files(tmp_path / "second", ".safetensors")
        expected = 0 if lie == "another digest" else 1  # where there is no such blob, nobody is to blame
        assert len(heard.warnings) == expected
        # Who makes it and may write puts it right.
        store.record(A, put(store))
        store.share(A, put(store))
    with Store(tmp_path / "third", shared=shared_in(far)) as store:
        made = store.lookup(A, "UNET-v1")
        assert made is not None
        opened(store, made).close()


NO_RECORDS: dict[str, Callable[[Path], object]] = {
    "of another key": lambda far: rewrite(far, lambda r: r.update(key=B)),
    "of another kind": lambda far: rewrite(far, lambda r: r.update(kind="fact")),
    "not JSON": lambda far: [p.write_bytes(encode(b"{", FILE, A, 1)) for p in files(far / "ac")],
    "no object": lambda far: [p.write_bytes(encode(b"[1]", FILE, A, 1)) for p in files(far / "ac")],
    "nested": lambda far: [p.write_bytes(encode(b"[" * 9**6, FILE, A, 1)) for p in files(far / "ac")],
    "no message": lambda far: [p.write_bytes(b"\xff" * 99) for p in files(far / "ac")],
    "huge": lambda far: [p.write_bytes(p.read_bytes() + b"\0" * (1 << 21)) for p in files(far / "ac")],
    "no digest": lambda far: rewrite(far, lambda r: r.update(sha256="../../etc/passwd")),
    "no digest of a component": lambda far: rewrite(far, lambda r: r.update(blake3="../x")),
    "a size that is none": lambda far: rewrite(far, lambda r: r.update(size=-1)),
    "a link": lambda far: [_linked(p) for p in files(far / "ac")],
    "a pipe": lambda far: [(p.unlink(), os.mkfifo(p)) for p in files(far / "ac")],
}


def _linked(path: Path) -> None:
    to = path.with_name("elsewhere")
    path.rename(to)
    path.symlink_to(to)


@pytest.mark.parametrize("what", NO_RECORDS)
def test_what_is_no_record_of_that_key_says_nothing(what: str, far: Path, tmp_path: Path) -> None:
    NO_RECORDS[what](far)
    with Store(tmp_path / "second", shared=shared_in(far)) as store:
        assert store.lookup(A, "UNET-v1") is None


def test_a_link_in_a_folder_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "cas").mkdir()
    (tmp_path / "cas" / A).symlink_to(__file__)
    assert not buckets.Folder(tmp_path).has(f"cas/{A}")
    with pytest.raises(Unavailable, match="is a link"):
        list(buckets.Folder(tmp_path).get(f"cas/{A}", 1 << 20))


def test_a_folder_that_cannot_be_looked_into_is_unavailable(tmp_path: Path) -> None:
    nowhere = buckets.Folder(tmp_path / ("x" * 300))
    with pytest.raises(Unavailable, match="File name too long"):
        nowhere.has(f"cas/{A}")
    with pytest.raises(Unavailable, match="File name too long"):
        nowhere.put(f"cas/{A}", b"x")


def test_answers_that_take_long_are_soon_done_without(
    far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is in time, and there are many: a build is not to wait for all of them."""
    monkeypatch.setattr("builder.store.shared.SLOW", 0.0)
    heard = Listener()
    shared = Shared(lambda: buckets.Folder(far), str(far), patience=0.0, reporter=heard)
    with Store(tmp_path / "second", shared=shared, reporter=heard) as store:
        assert store.lookup(A, "UNET-v1") is not None, "what was answered is used"
        (far / "ac").rename(far / "moved")  # nobody looks
        assert store.lookup(B, "UNET-v1") is None and store.lookup(C, "UNET-v1") is None
    assert len(heard.warnings) == 1 and "seconds for an answer" in heard.warnings[0].evidence[0]


def test_no_room_ends_nothing(far: Path, tmp_path: Path) -> None:
    """A store that cannot keep a blob does without it."""
    rewrite(far, lambda r: r.update(size=1 << 60, bytes=(1 << 60) - 1000))
    heard = Listener()
    with Store(tmp_path / "second", shared=shared_in(far, reporter=heard), reporter=heard) as store:
        made = store.lookup(A, "UNET-v1")
        assert made is not None and store.open(made.digest) is None
    assert any("no room" in e for w in heard.warnings for e in w.evidence)


def test_a_folder_that_cannot_be_written_to(far: Path, tmp_path: Path) -> None:
    heard = Listener()
    (tmp_path / "full").write_bytes(b"")
    with Store(tmp_path / "first", shared=shared_in(tmp_path / "full", reporter=heard)) as store:
        store.share(B, put(store, B, 1))
        store.share(C, put(store, C, 2))
    assert [w.fact for w in heard.warnings] == ["nothing more is put into the shared store"]


def test_what_is_there_is_not_written_again(far: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in files(far)}
    with Store(tmp_path / "second", shared=shared_in(far)) as store:
        made = put(store)  # made here too
        store.share(A, made)
        store.share(B, made)  # another action that makes the same
    after = {p: p.stat().st_mtime_ns for p in files(far)}
    assert len(after) == len(before) + 1 and before.items() <= after.items()


def test_an_other_result_replaces_what_is_said(far: Path, tmp_path: Path) -> None:
    """Who may write has made it himself: his word is the newer."""
    with Store(tmp_path / "second", shared=shared_in(far)) as store:
        made = put(store, A, 7)
        store.share(A, made)
    with Store(tmp_path / "third", shared=shared_in(far)) as store:
        assert store.lookup(A, "UNET-v1") == made


def test_claims_say_what_they_are() -> None:
    made = Made("UNET-v1-SD", "UNET-v1", A, 4, 660, ("a fix",))
    from builder.store.shared import claim_from_record

    assert claim_from_record(Claim(made, B, 900).record()) == Claim(made, B, 900)


# -- builds


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Folder]:
    """A folder whose product one machine has built, and shared."""
    folder = Folder.below(tmp_path).tiny()
    folder.know("dirty.ckpt", "vae.safetensors")
    folder.build("tiny.toml", "--store", tmp_path / "far", "--store-write")
    yield folder


def elsewhere(work: Folder, name: str = "other") -> Folder:
    """The same folder on another machine, without the product."""
    other = work.beside(name, store=f"{name}-store")
    (other / "tiny.safetensors").unlink(missing_ok=True)
    other.know("dirty.ckpt", "vae.safetensors")
    return other


def test_a_build_makes_nothing_that_another_has_made(work: Folder) -> None:
    other, far = elsewhere(work), work.path.parent / "far"
    made = other.build("tiny.toml", "--store", far)
    assert made["made"] == [] and made["outputs"][0]["state"] == "written"
    assert (other / "tiny.safetensors").read_bytes() == (work / "tiny.safetensors").read_bytes()
    assert made["changes"] == work.build()["changes"]
    assert other.build("tiny.toml", "--store", far)["outputs"][0]["state"] == "unchanged"


def test_a_plan_says_whose_word_it_is(work: Folder) -> None:
    other = elsewhere(work)
    said = other("plan", "tiny.toml", "--store", work.path.parent / "far").out
    assert said.count("the shared store says that it was made before") == 3
    assert "make" in other("plan", "tiny.toml").out.splitlines()[2]


def test_a_step_of_anothers_is_used_and_what_is_made_of_it_is_known_again(tmp_path: Path) -> None:
    """Of a component that is the shared store's, what is made here is known by its word too."""
    work, far = Folder.below(tmp_path), tmp_path / "far"
    for seed, name in enumerate("ab"):
        save(work / f"{name}.safetensors", model(seed=seed))
    work.write("merged.toml", MERGE)
    work.know("a.safetensors", "b.safetensors")
    work.build("merged.toml", "--store", far, "--store-write")
    other = work.beside("other", store="other-store")
    (other / "merged.safetensors").unlink()
    other.write("merged.toml", MERGE + '[output]\nprecision = "fp16"\n')
    other.know("a.safetensors", "b.safetensors")
    made = other.build("merged.toml", "--store", far)
    assert other.build("merged.toml", "--store", far)["outputs"][0]["state"] == "unchanged"
    own = other.beside("own", store="own-store")
    (own / "merged.safetensors").unlink()
    assert len(own.build("merged.toml")["made"]) > len(made["made"]), "the merge itself was had"
    assert (own / "merged.safetensors").read_bytes() == (other / "merged.safetensors").read_bytes()
    without = {n: s for n, s in other.states("merged.toml").items() if n.startswith("UNET")}
    assert "stored" not in without.values()


def _poisoned(work: Folder, change: Callable[[Any], Any] = dict) -> Path:
    """The shared store, of which one record now leads to another UNET, whole and sound in itself."""
    far = work.path.parent / "far"
    with Store(work.path.parent / "attacker", shared=shared_in(far)) as store:
        unet = {n.removeprefix(UNET): t for n, t in model().items() if n.startswith(UNET)}
        step = next(s for s in work.plan()["steps"] if s["label"].startswith("UNET"))
        name = Store(work.store).entry(step["digest"]).component
        evil = store.save(name, "UNET-tiny", change({n: like(t, fill=666.0) for n, t in unet.items()}))
        key = step["action"]
        store.record(key, evil)
        store.share(key, evil)
    return far


def test_a_name_that_the_catalog_does_not_know(work: Folder) -> None:
    """Another catalog's, or nonsense: what is said under it is not understood, and made here."""
    other, far = elsewhere(work), work.path.parent / "far"
    rewrite(far, lambda r: r.update(component="UNET-\x1b[31m"))
    assert len(other.build("tiny.toml", "--store", far)["made"]) == 3


def test_a_size_that_no_such_component_has(work: Folder) -> None:
    other, far = elsewhere(work), work.path.parent / "far"
    rewrite(far, lambda r: r.update(size=1 << 40, bytes=(1 << 40) - 1000))
    said = other("build", "tiny.toml", "--store", far, "--json").json
    assert len(said["made"]) == 3 and not said["warnings"], "nothing of it is asked for"


def test_what_is_no_such_component_is_made_here(work: Folder) -> None:
    """Its digest is right, and it lacks a weight."""
    other, far = elsewhere(work), _poisoned(work, lambda unet: dict(list(unet.items())[1:]))
    (other / "tiny.lock.toml").unlink()
    said = other("build", "tiny.toml", "--store", far)
    assert said.code == 0 and "are not those of such a component" in said.err
    assert (other / "tiny.safetensors").read_bytes() == (work / "tiny.safetensors").read_bytes()


def test_what_the_lock_says_otherwise_is_made_here(work: Folder) -> None:
    other, far = elsewhere(work), _poisoned(work)
    said = other("build", "tiny.toml", "--store", far, "--locked")
    assert said.code == 0 and "what the shared store has for `UNET-tiny-" in said.err
    assert (other / "tiny.safetensors").read_bytes() == (work / "tiny.safetensors").read_bytes()


def test_what_the_recipe_expects_otherwise_is_made_here(work: Folder) -> None:
    other, far = elsewhere(work), _poisoned(work)
    (other / "tiny.lock.toml").unlink()
    sha256 = hashlib.sha256((work / "tiny.safetensors").read_bytes()).hexdigest()
    other.write("tiny.toml", (work / "tiny.toml").read_text() + f'expect.sha256 = "{sha256}"\n')
    said = other("build", "tiny.toml", "--store", far)
    assert said.code == 0, said.err
    assert said.err.count("what the shared store has for") == 3
    assert (other / "tiny.safetensors").read_bytes() == (work / "tiny.safetensors").read_bytes()


def test_what_a_writer_of_the_shared_store_can_do(work: Folder) -> None:
    """Without a lock or an expectation he is believed, while his store is set, and no longer."""
    other, far = elsewhere(work), _poisoned(work)
    (other / "tiny.lock.toml").unlink()
    other.build("tiny.toml", "--store", far)
    assert content(other / "tiny.safetensors") != content(work / "tiny.safetensors")
    (other / "tiny.lock.toml").unlink()
    other.build("tiny.toml")
    assert content(other / "tiny.safetensors") == content(work / "tiny.safetensors")


def test_what_rests_on_anothers_word_is_told(work: Folder) -> None:
    """Where no lock pins it, so that nobody signs unawares what he did not make."""
    other, far = elsewhere(work), _poisoned(work)
    (other / "tiny.lock.toml").unlink()
    said = other("build", "tiny.toml", "--store", far)
    assert "note: on the word of the shared store: `UNET-tiny of dirty`" in said.err
    assert "the word of" not in other("build", "tiny.toml", "--store", far).err, "the lock pins it now"
    (other / "tiny.lock.toml").unlink()
    said = other("build", "tiny.toml", "--store", far, "--statement")
    assert (
        said.code == 0 and "warning: on the word of the shared store" in said.err and "`--check`" in said.err
    )
    (other / "tiny.lock.toml").unlink()
    said = other("build", "tiny.toml", "--store", far, "--check", "--statement")
    assert said.code == 8 and not (other / "tiny.lock.toml").exists(), "and is found out"


def test_sharing_needs_a_store(work: Folder) -> None:
    assert work("build", "tiny.toml", "--store-write").code == 2


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "relative/folder", "https://user:secret@host/", "s3:///x", "s3://a@b/x"]
)
def test_what_is_no_address(url: str, work: Folder) -> None:
    said = work("build", "tiny.toml", "--store", url)
    assert said.code == 2 and "secret" not in said.err


def test_every_form_of_output_is_shared(tmp_path: Path) -> None:
    """The files of a set hold no places, and what is in them is shared all the same."""
    folder = Folder.below(tmp_path).tiny()
    folder.build(
        "tiny.toml", "-o", "tiny.safetensors.index.json", "--store", tmp_path / "far", "--store-write"
    )
    assert len(files(tmp_path / "far" / "cas")) == 3


def test_from_python(work: Folder, tmp_path: Path) -> None:
    other, far = elsewhere(work), str(tmp_path / "python")
    for store, made in (("one", 3), ("two", 0)):
        (other / "tiny.safetensors").unlink(missing_ok=True)
        with _environment(other.variables):
            face = Workspace(store=tmp_path / store, shared=far, share=True)
            result = face.build(face.load(other / "tiny.toml"))
        assert len(result.made) == made

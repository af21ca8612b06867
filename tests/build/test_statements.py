"""Statements of provenance: what they say, where they lie, and files that are held to them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.base.dsse import PrivateKey, pae, seal
from builder.recipe.provenance import MAX_SIZE, PAYLOAD, read_statement
from tests.help import keys, special_files
from tests.help.building import RECIPE, Folder, files, model, save
from tests.help.recipe_words import golden

GOLDEN = Path(__file__).parent / "golden"
STATEMENT = "tiny.safetensors.intoto.json"
LATE = {"SOURCE_DATE_EPOCH": "1700000000"}


def signing() -> None:
    """Skip where nothing can be signed."""
    pytest.importorskip("cryptography", reason="`cryptography` is what signs, and is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).tiny()


@pytest.fixture
def stated(folder: Folder) -> Folder:
    folder.build("tiny.toml", "--statement")
    return folder


@pytest.fixture
def signed(folder: Folder) -> Folder:
    signing()
    keys.public(folder / "pub")
    folder.build("tiny.toml", "--sign", keys.private(folder / "key"))
    return folder


def said(folder: Folder, name: str = STATEMENT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_bytes())
    return found


def timeless(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", text)


# -- what is written


def test_only_where_it_is_asked_for(folder: Folder) -> None:
    assert folder.build()["outputs"][0]["statement"] is None
    assert not (folder / STATEMENT).exists()
    assert folder.build("tiny.toml", "--statement")["outputs"][0]["statement"] == STATEMENT
    assert (folder / STATEMENT).exists()


def test_what_it_says(folder: Folder) -> None:
    """All of it: the product, the recipe, the sources, the components and the lock, by digest."""
    late = replace(folder, environment=LATE)
    late.build("tiny.toml", "--statement")
    text = (folder / STATEMENT).read_text()
    assert golden(GOLDEN / "statement.json", text) == text
    found = json.loads(text)
    (subject,), predicate = found["subject"], found["predicate"]
    digest = {
        n: hashlib.sha256((folder / n).read_bytes()).hexdigest()
        for n in ("tiny.safetensors", "dirty.ckpt", "vae.safetensors", "tiny.lock.toml")
    }
    assert subject["digest"] == {"sha256": digest["tiny.safetensors"]}
    near = {s["name"]: s["digest"]["sha256"] for s in predicate["buildDefinition"]["resolvedDependencies"]}
    assert near == {"dirty": digest["dirty.ckpt"], "vae": digest["vae.safetensors"]}
    assert predicate["runDetails"]["byproducts"][-1]["digest"] == {"sha256": digest["tiny.lock.toml"]}
    assert predicate["runDetails"]["metadata"]["startedOn"] == "2023-11-14T22:13:20Z"


def test_the_same_everywhere_but_for_times(folder: Folder) -> None:
    other = folder.beside("elsewhere", store="other-store")
    folder.build("tiny.toml", "--statement")
    other.build("tiny.toml", "--statement", "--threads", "1")
    first, second = ((f / STATEMENT).read_text() for f in (folder, other))
    assert "TIME" not in first and timeless(first) == timeless(second)
    assert timeless(first).count("TIME") == 2
    for name in ("tiny.safetensors", "tiny.lock.toml"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert str(folder.path).encode() not in first.encode()


def test_it_is_left_alone_while_it_says_the_same(stated: Folder) -> None:
    before, text = (stated / STATEMENT).stat(), (stated / STATEMENT).read_bytes()
    assert stated.build("tiny.toml", "--statement")["outputs"][0]["state"] == "unchanged"
    after = (stated / STATEMENT).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert b"startedOn" in text and (stated / STATEMENT).read_bytes() == text
    data = said(stated)
    data["predicate"]["runDetails"]["metadata"]["invocationId"] = "planted"
    (stated / STATEMENT).write_text(json.dumps(data, indent=2) + "\n")
    stated.build("tiny.toml", "--statement")
    assert b"planted" not in (stated / STATEMENT).read_bytes()
    assert "metadata" not in said(stated)["predicate"]["runDetails"], "nobody knows when it was made"


def test_an_old_one_is_told_of(stated: Folder) -> None:
    stated.write("tiny.toml", RECIPE + 'output.precision = "bf16"\n')
    told = stated("build", "tiny.toml")
    assert told.code == 0 and f"`{STATEMENT}` is of what was there before" in told.err
    assert stated("verify", "--statement", STATEMENT).code == 7
    stated.build("tiny.toml", "--statement")
    assert stated("verify", "--statement", STATEMENT).code == 0


def test_of_every_output_its_own(folder: Folder) -> None:
    """A source that an output does not need is not among its own."""
    of = '[[output]]\nname = "{0}"\ncomponents.VAE-tiny = "{0}"\n'
    head = 'format = 1\nname = "tiny"\nbase = "NEW VAE-tiny"\n'
    names = "sources.dirty.file = 'dirty.ckpt'\nsources.vae.file = 'vae.safetensors'\n"
    folder.write("tiny.toml", head + names + of.format("dirty") + of.format("vae"))
    outputs = folder.build("tiny.toml", "--statement")["outputs"]
    assert [o["statement"] for o in outputs] == [
        f"tiny-{n}.safetensors.intoto.json" for n in ("dirty", "vae")
    ]
    found = said(folder, "tiny-vae.safetensors.intoto.json")["predicate"]["buildDefinition"]
    assert [s["name"] for s in found["resolvedDependencies"]] == ["vae"]
    assert found["externalParameters"]["output"] == "vae"


def test_what_is_there_and_is_no_statement_stays(folder: Folder) -> None:
    folder.write(STATEMENT, "mine")
    before = files(folder.path)
    told = folder("build", "tiny.toml", "--statement")
    assert told.code == 7 and "is no statement" in told.err and "mine" not in told.err
    assert files(folder.path) == before and (folder / STATEMENT).read_text() == "mine"


def test_a_link_in_its_place_is_not_written_through(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (folder / STATEMENT).symlink_to(tmp_path / "victim")
    assert folder("build", "tiny.toml", "--statement").code == 7
    assert (tmp_path / "victim").read_text() == "mine" and not (folder / "tiny.safetensors").exists()


@pytest.mark.parametrize("name", ["set.safetensors.index.json", "tiny.ckpt"])
def test_other_forms(folder: Folder, name: str) -> None:
    folder.build("tiny.toml", "--statement", "-o", name)
    found = said(folder, f"{name}.intoto.json")
    for subject in found["subject"]:
        digest = hashlib.sha256((folder / subject["name"]).read_bytes()).hexdigest()
        assert subject["digest"] == {"sha256": digest}
    assert name in {s["name"] for s in found["subject"]}
    assert "lock" not in {p["annotations"]["kind"] for p in found["predicate"]["runDetails"]["byproducts"]}
    assert folder("verify", "--statement", f"{name}.intoto.json").code == 0
    last = folder / max(s["name"] for s in found["subject"] if not s["name"].endswith(".json"))
    last.write_bytes(last.read_bytes()[:-1] + b"\xff")
    assert folder("verify", "--statement", f"{name}.intoto.json").code == 7


def test_a_folder_of_diffusers(tmp_path: Path) -> None:
    """Every file of it, its configurations too; what is in it besides is told."""
    folder = Folder.below(tmp_path).mini()
    folder.build("mini.toml", "--statement", "-o", "model")
    names = {s["name"] for s in said(folder, "model.intoto.json")["subject"]}
    assert {"model/model_index.json", "model/unet/config.json"} < names
    assert names == {f"model/{n}" for n in files(folder / "model") if (folder / "model" / n).is_file()}
    assert folder("verify", "--statement", "model.intoto.json").code == 0
    (folder / "model").rename(folder / "renamed")
    folder.write("renamed/unet/more.bin", "more")
    told = folder("verify", "--statement", "model.intoto.json", "renamed/")
    assert told.code == 0 and "says nothing of `unet/more.bin`" in told.err
    inside = replace(folder, path=folder / "renamed")
    assert inside("verify", "--statement", "../model.intoto.json", ".").code == 0
    config = folder / "renamed" / "unet" / "config.json"
    config.write_text(config.read_text().replace("4", "5", 1))
    told = folder("verify", "--statement", "model.intoto.json", "renamed")
    assert told.code == 7 and "model/unet/config.json: expected SHA-256" in told.err


def test_a_configuration_beside_it(folder: Folder) -> None:
    """It says which classes a program makes, so it is stated as the weights are."""
    folder.write("model.yaml", "model: {}\n")
    folder.write("tiny.toml", RECIPE + 'output.config = "model.yaml"\n')
    folder.build("tiny.toml", "--statement")
    text = (folder / STATEMENT).read_bytes()
    assert [s["name"] for s in said(folder)["subject"]] == ["tiny.safetensors", "tiny.yaml"]
    verify = ("verify", "tiny.toml", "--statement", STATEMENT)
    assert folder(*verify).code == 0
    assert folder.build("tiny.toml", "--statement")["outputs"][0]["state"] == "unchanged"
    assert (folder / STATEMENT).read_bytes() == text
    (folder / "tiny.yaml").rename(folder / "other.yaml")
    told = folder(*verify)
    assert told.code == 6 and "no `tiny.yaml`" in told.err and f"--statement {STATEMENT} FILE" in told.err
    told = folder(*verify, "tiny.safetensors")
    assert told.code == 0 and "`tiny.yaml`, which the statement is of too, is not beside" in told.err
    (folder / "tiny.safetensors").rename(folder / "other.safetensors")
    assert "is not beside" not in folder(*verify, "other.safetensors").err
    folder.write("other.yaml", "model: {target: os.system}\n")
    told = folder(*verify, "other.safetensors")
    assert told.code == 7 and "tiny.yaml: expected SHA-256" in told.err
    assert "only the header" not in told.err


def test_a_configuration_that_is_not_ours_is_not_stated(folder: Folder) -> None:
    folder.write("model.yaml", "model: {}\n")
    folder.write("tiny.yaml", "mine: {}\n")
    folder.write("tiny.toml", RECIPE + 'output.config = "model.yaml"\n')
    assert "stays as it is" in folder("build", "tiny.toml", "--statement").err
    assert [s["name"] for s in said(folder)["subject"]] == ["tiny.safetensors"]


# -- files are held to it


def test_the_right_file(stated: Folder) -> None:
    told = stated("verify", "--statement", STATEMENT)
    digest = hashlib.sha256((stated / "tiny.safetensors").read_bytes()).hexdigest()
    assert told.code == 0 and told.out.startswith(f"verified  tiny.safetensors\n  sha256 {digest}\n")
    assert told.out.endswith(f"statement  {STATEMENT}, unsigned\n")
    assert stated("verify", "tiny.toml", "--statement", STATEMENT).code == 0
    (stated / "tiny.safetensors").rename(stated / "renamed.safetensors")
    assert stated("verify", "--statement", STATEMENT).code == 6
    assert stated("verify", "--statement", STATEMENT, "renamed.safetensors").code == 0
    assert stated("verify", "tiny.toml", "renamed.safetensors", "--statement", STATEMENT).code == 0


def test_file_and_statement_are_enough(stated: Folder) -> None:
    bare = Folder(stated.path.parent / "bare", stated.path.parent / "empty")
    bare.path.mkdir()
    for name in ("tiny.safetensors", STATEMENT):
        (bare / name).write_bytes((stated / name).read_bytes())
    before = files(bare.path)
    assert bare("verify", "--statement", STATEMENT).code == 0
    assert files(bare.path) == before


def test_another_component_is_named(stated: Folder) -> None:
    other = stated.beside("other")
    save(other / "vae.safetensors", model("VAE-tiny", seed=3))
    other.build()
    told = stated("verify", "--statement", STATEMENT, other / "tiny.safetensors")
    assert told.code == 7 and told.out == ""
    text = told.err.replace(str(other.path), "…")
    assert golden(GOLDEN / "statement-component.txt", text) == text
    assert "VAE-tiny: expected" in text and "UNET-tiny" not in text
    told = stated("verify", "--statement", STATEMENT, "vae.safetensors")
    assert told.code == 7 and "UNET-tiny: expected 5a061e68ebf2…, found none" in told.err


def test_another_recipe_is_named(stated: Folder) -> None:
    stated.write("tiny.toml", RECIPE.replace('"tiny"', '"tine"') + "output.metadata.author = 'you'\n")
    told = stated("verify", "tiny.toml", "--statement", STATEMENT)
    assert told.code == 7
    assert golden(GOLDEN / "statement-recipe.txt", told.err) == told.err
    assert "output.metadata.author" in told.err or "output.metadata" in told.err
    stated.write("tiny.toml", "# a comment\n" + RECIPE)
    assert stated("verify", "tiny.toml", "--statement", STATEMENT).code == 0


def test_another_lock_is_named(stated: Folder) -> None:
    save(stated / "vae.safetensors", model("VAE-tiny", seed=3))
    kept = (stated / "tiny.safetensors").read_bytes()
    stated.build()
    (stated / "tiny.safetensors").write_bytes(kept)
    told = stated("verify", "tiny.toml", "--statement", STATEMENT)
    assert told.code == 7 and "the lock is of another build than the statement" in told.err
    assert "source `vae`: sha256" in told.err
    assert stated("verify", "tiny.toml", "--no-lock", "--statement", STATEMENT).code == 0


def test_words_of_the_command(stated: Folder) -> None:
    assert stated("verify").code == 2
    assert "`--statement FILE` names it" in stated("verify", "tiny.toml", "--key", "pub").err
    assert stated("verify", "--statement", "none.json").code == 6


def test_a_time_that_is_none_is_told_before_all_else(folder: Folder) -> None:
    wrong = replace(folder, environment={"SOURCE_DATE_EPOCH": "soon"})
    assert wrong("build", "tiny.toml", "--statement").code == 2
    assert not (folder / "tiny.safetensors").exists()


# -- signed


def test_the_encoding_is_that_of_the_protocol() -> None:
    """Its own test vector."""
    found = pae("http://example.com/HelloWorld", b"hello world")
    assert found == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_a_signed_one(folder: Folder) -> None:
    """A signature of Ed25519 is the same each time: so is the whole envelope."""
    signing()
    late = replace(folder, environment=LATE)
    key, pub = keys.private(folder / "key"), keys.public(folder / "pub")
    late.build("tiny.toml", "--statement")
    plain = (folder / STATEMENT).read_bytes()
    (folder / "tiny.safetensors").unlink()
    late.build("tiny.toml", "--sign", key)
    text = (folder / STATEMENT).read_text()
    assert golden(GOLDEN / "statement-signed.json", text) == text
    envelope = json.loads(text)
    assert base64.b64decode(envelope["payload"]) == plain
    assert envelope["signatures"][0]["keyid"] == hashlib.sha256(keys.der()).hexdigest()
    told = folder("verify", "--statement", STATEMENT, "--key", pub)
    assert told.code == 0 and told.err == "" and "signed with the key" in told.out
    data = folder("verify", "--statement", STATEMENT, "--key", pub, "--json").json
    assert data["statement"] == {"path": STATEMENT, "signed": True, "key": envelope["signatures"][0]["keyid"]}
    line = keys.public_line(folder / "line")
    assert folder("verify", "tiny.toml", "--statement", STATEMENT, "--key", line).code == 0


def test_a_signature_is_not_made_again(signed: Folder) -> None:
    before = (signed / STATEMENT).read_bytes()
    for words in (("--sign", "key"), ("--statement",)):
        signed.build("tiny.toml", *words)
        assert (signed / STATEMENT).read_bytes() == before
    signed.build("tiny.toml", "--sign", keys.private(signed / "other", keys.OTHER_SEED))
    assert (signed / STATEMENT).read_bytes() != before
    assert signed("verify", "--statement", STATEMENT, "--key", "pub").code == 6


def test_a_signature_that_nobody_looks_at_is_told_of(signed: Folder) -> None:
    told = signed("verify", "--statement", STATEMENT)
    assert told.code == 0 and "nobody looked at the statement's signature" in told.err


def test_what_is_unsigned_is_refused_with_a_key(stated: Folder) -> None:
    signing()
    told = stated("verify", "--statement", STATEMENT, "--key", keys.public(stated / "pub"))
    assert told.code == 6 and "is not signed" in told.err and told.out == ""


def test_another_key(signed: Folder) -> None:
    """Whatever key the envelope says that it is of."""
    other = keys.public(signed / "other", keys.OTHER_POINT)
    envelope = said(signed)
    envelope["signatures"][0]["keyid"] = hashlib.sha256(keys.der(keys.OTHER_POINT)).hexdigest()
    signed.write(STATEMENT, json.dumps(envelope))
    told = signed("verify", "--statement", STATEMENT, "--key", other)
    assert told.code == 6 and "not signed with the key" in told.err
    assert signed("verify", "--statement", STATEMENT, "--key", "pub").code == 0, "a hint, and no more"


def _payload(envelope: dict[str, Any], payload: bytes) -> None:
    envelope["payload"] = base64.b64encode(payload).decode()


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "another payload": lambda e: _payload(e, base64.b64decode(e["payload"]).replace(b"tiny", b"tony")),
    "a space more": lambda e: _payload(e, base64.b64decode(e["payload"]) + b" "),
    "another type": lambda e: e.update(payloadType="application/json"),
    "no signature": lambda e: e.update(signatures=[]),
    "no list of signatures": lambda e: e.update(signatures={"sig": e["signatures"][0]["sig"]}),
    "an empty signature": lambda e: e["signatures"][0].update(sig=""),
    "no Base64": lambda e: e["signatures"][0].update(sig="\x1b[31m"),
    "half a signature": lambda e: e["signatures"][0].update(sig=e["signatures"][0]["sig"][:44]),
    "a list for a signature": lambda e: e.update(signatures=[[]]),
    "too many signatures": lambda e: e.update(signatures=e["signatures"] * 65),
    "no payload": lambda e: e.pop("payload"),
    "a payload that is none": lambda e: e.update(payload=12),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_is_forged_is_refused(name: str, signed: Folder) -> None:
    envelope = said(signed)
    FORGED[name](envelope)
    signed.write(STATEMENT, json.dumps(envelope))
    told = signed("verify", "--statement", STATEMENT, "--key", "pub")
    assert told.code == 6 and told.out == "" and "Traceback" not in told.err and "\x1b" not in told.err


def test_one_of_several_signatures_is_enough(signed: Folder) -> None:
    envelope = said(signed)
    envelope["signatures"].insert(0, {"sig": base64.urlsafe_b64encode(b"\xff" * 64).decode()})
    signed.write(STATEMENT, json.dumps(envelope))
    assert signed("verify", "--statement", STATEMENT, "--key", "pub").code == 0


def test_what_is_signed_as_something_else_is_no_statement(signed: Folder) -> None:
    """The right key, the right bytes, but they were signed as being of another type."""
    key = PrivateKey.read(signed / "key", "--sign")
    payload = base64.b64decode(said(signed)["payload"])
    (signed / STATEMENT).write_bytes(seal("text/plain", payload, key))
    told = signed("verify", "--statement", STATEMENT, "--key", "pub")
    assert told.code == 6 and "`payloadType` is not" in told.err
    (signed / STATEMENT).write_bytes(seal(PAYLOAD, b"[]", key))
    told = signed("verify", "--statement", STATEMENT, "--key", "pub")
    assert told.code == 6 and "it is no JSON object" in told.err


def _of_another_kind(path: Path) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = path / "ec", path / "ec.pub"
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    form_of = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form_of))
    return private, public


def test_keys_that_are_none(signed: Folder) -> None:
    """Of another kind, the wrong half, garbage: told by name, and nothing of them is shown."""
    ec_private, ec_public = _of_another_kind(signed.path)
    (signed / "raw").write_bytes(bytes.fromhex(keys.SEED))
    (signed / "cut").write_text("-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYD\n-----END PRIVATE KEY-----\n")
    (signed / "endless").symlink_to("/dev/zero")
    (signed / "huge").write_bytes(bytes(1 << 20))
    before = files(signed.path)
    for name in ("raw", "cut", "endless", "huge", "none", ".", "pub", ec_private):
        told = signed("build", "tiny.toml", "--sign", name)
        assert told.code == 2 and told.err.startswith("error: "), name
        assert "MC4CAQ" not in told.err and "Traceback" not in told.err
    for name in ("raw", "cut", "endless", "huge", "none", ".", "key", ec_public):
        told = signed("verify", "--statement", STATEMENT, "--key", name)
        assert told.code == 2 and told.err.startswith("error: "), name
    assert files(signed.path) == before
    told = signed("verify", "--statement", STATEMENT, "--key", "key")
    assert "openssl pkey -in key -pubout" in told.err


def test_an_encrypted_key_is_told_of(folder: Folder) -> None:
    signing()
    from cryptography.hazmat.primitives import serialization

    key = PrivateKey.read(keys.private(folder / "key"), "--sign").inner
    lock = serialization.BestAvailableEncryption(b"secret")
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "my key").write_bytes(key.private_bytes(*form, lock))
    told = folder("build", "tiny.toml", "--sign", "my key")
    assert (
        told.code == 2
        and "it is encrypted" in told.err
        and "`openssl pkey -in 'my key' -out COPY`" in told.err
    )


def test_without_what_signs(folder: Folder) -> None:
    """The package is asked for by name, and only where it is needed."""
    keys.private(folder / "key")
    gone = "sys.modules['cryptography'] = None"
    told = folder.process("build", "tiny.toml", "--sign", "key", before=gone)
    assert told.code == 2 and "ckpt-build[sign]" in told.err
    assert folder.process("build", "tiny.toml", "--statement", before=gone).code == 0
    assert folder.process("verify", "--statement", STATEMENT, before=gone).code == 0


# -- hostile


def _set(*keys: str | int, to: object) -> Callable[[dict[str, Any]], object]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


DEFINITION, DETAILS = ("predicate", "buildDefinition"), ("predicate", "runDetails")
WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "another type": _set("_type", to="https://in-toto.io/Statement/v0.1"),
    "another predicate": _set("predicateType", to="https://slsa.dev/provenance/v0.2"),
    "another build": _set(*DEFINITION, "buildType", to="https://actions.github.io/buildtypes/workflow/v1"),
    "no predicate": lambda d: d.pop("predicate"),
    "a predicate that is none": _set("predicate", to=[]),
    "no subject": _set("subject", to=[]),
    "subjects that are none": _set("subject", to=["tiny.safetensors"]),
    "one subject twice": lambda d: d["subject"].append(d["subject"][0]),
    "a digest that is none": _set("subject", 0, "digest", to={"sha256": "../../x"}),
    "a digest in capitals": _set("subject", 0, "digest", to={"sha256": "A" * 64}),
    "a weak digest alone": _set("subject", 0, "digest", to={"md5": "0" * 32}),
    **{
        f"a subject named {name!r}": _set("subject", 0, "name", to=name)
        for name in (
            "",
            ".",
            "..",
            "../x",
            "/etc/passwd",
            "a//b",
            "a/../b",
            "a\\b",
            "a\0b",
            "x" * 5000,
            7,
            None,
        )
    },
    "another recipe under its digest": _set(*DEFINITION, "externalParameters", "recipe", "name", to="other"),
    "a recipe that is none": _set(*DEFINITION, "externalParameters", "recipe", to=[]),
    "sources that are none": _set(*DEFINITION, "resolvedDependencies", to={}),
    "a size that is none": _set(*DEFINITION, "resolvedDependencies", 0, "annotations", "size", to=True),
    "no by-products": _set(*DETAILS, "byproducts", to=[]),
    "two outputs": lambda d: d["predicate"]["runDetails"]["byproducts"].extend(
        2 * [p for p in d["predicate"]["runDetails"]["byproducts"] if p["annotations"]["kind"] == "output"]
    ),
    "a time that is none": _set(*DETAILS, "metadata", "startedOn", to="\x1b[31mnow"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_statement_is_refused(name: str, stated: Folder) -> None:
    data = said(stated)
    WRONG[name](data)
    stated.write(STATEMENT, json.dumps(data))
    told = stated("verify", "--statement", STATEMENT)
    assert told.code == 6 and told.out == "" and "is no statement of provenance" in told.err
    assert "\x1b" not in told.err and "Traceback" not in told.err


ODD: tuple[Any, ...] = (
    None,
    [],
    {},
    "",
    0,
    -1,
    True,
    1.5,
    1 << 80,
    "\x1b[31m",
    "../x",
    [[]],
    {"sha256": 1},
    [None],
)


def _places(data: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a value of JSON but the whole."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in inner for place in ((*at, key), *_places(value, (*at, key)))]


def test_anything_anywhere_is_read_or_refused(stated: Folder) -> None:
    """Each field in turn holds what it never should: nothing but a message comes of it."""
    whole, accepted = said(stated), 0
    for place in _places(whole):
        for odd in ODD:
            data = json.loads(json.dumps(whole))
            _set(*place, to=odd)(data)
            try:
                read_statement(data)
            except ValueError as error:
                assert str(error).isprintable()
                continue
            accepted += 1
            if accepted % 20 == 0:
                stated.write(STATEMENT, json.dumps(data))
                for words in ((), ("tiny.toml",)):
                    told = stated("verify", *words, "--statement", STATEMENT)
                    assert told.code in (0, 6, 7) and "Traceback" not in told.err and "\x1b" not in told.err
    assert accepted > 100, "what others may add is passed over"


DEEP = 100_000
RAW: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"secret",
    "no UTF-8": b'{"_type": "\xff"}',
    "no object": b"[]",
    "deep lists": b"[" * DEEP,
    "deep objects": b'{"a":' * DEEP,
    "deep under the predicate": b'{"predicate":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "objects without number": b'{"subject":[' + b"{}," * 200_000 + b"{}]}",
    "a number without end": b'{"predicate":' + b"9" * 100_000 + b"}",
    "no number": b'{"predicate": NaN}',
    "a name twice": b'{"a": 1, "a": "secret"}',
    "half a character": b'{"_type": "\\ud800"}',
    "an envelope of nothing": b'{"payloadType": "application/vnd.in-toto+json", "payload": "",'
    b' "signatures": [{"sig": ""}]}',
    "too large": b" " * (MAX_SIZE + 1),
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_json_is_refused(name: str, stated: Folder) -> None:
    (stated / STATEMENT).write_bytes(RAW[name])
    told = stated("verify", "--statement", STATEMENT)
    assert told.code == 6 and "is no statement of provenance" in told.err and "secret" not in told.err


def test_a_name_that_stands_twice(stated: Folder) -> None:
    """Programs differ in which of two they take: what one checks is not what another reads."""
    text = (stated / STATEMENT).read_text().rstrip().removesuffix("}")
    stated.write(STATEMENT, text + ', "subject": [{"name": "x", "digest": {"sha256": "' + "0" * 64 + '"}}]}')
    told = stated("verify", "--statement", STATEMENT)
    assert told.code == 6 and "a name stands twice in one object" in told.err


def test_a_deep_payload_is_refused(signed: Folder) -> None:
    key = PrivateKey.read(signed / "key", "--sign")
    for name in ("deep lists", "objects without number", "a name twice"):
        (signed / STATEMENT).write_bytes(seal(PAYLOAD, RAW[name], key))
        assert signed("verify", "--statement", STATEMENT, "--key", "pub").code == 6


@pytest.mark.parametrize("make", [special_files.pipe, special_files.zeros, special_files.socket, Path.mkdir])
def test_what_is_no_file_is_not_waited_for(make: Callable[[Path], object], stated: Folder) -> None:
    (stated / STATEMENT).unlink()
    make(stated / STATEMENT)
    assert stated("verify", "--statement", STATEMENT).code == 6


def test_nothing_of_what_a_link_leads_to_is_shown(stated: Folder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"_type": "s3cr3t"}')
    (stated / STATEMENT).unlink()
    (stated / STATEMENT).symlink_to(tmp_path / "secret")
    told = stated("verify", "--statement", STATEMENT)
    assert told.code == 6 and "s3cr3t" not in told.err


def test_a_subject_does_not_lead_out(stated: Folder, tmp_path: Path) -> None:
    """A file that its name leads to is hashed only where somebody names it."""
    (tmp_path / "outside").write_text("secret")
    (stated / "tiny.safetensors").rename(tmp_path / "outside.safetensors")
    (stated / "tiny.safetensors").symlink_to(tmp_path / "outside")
    told = stated("verify", "--statement", STATEMENT)
    digest = hashlib.sha256(b"secret").hexdigest()
    assert told.code == 6 and "a link leads out of it" in told.err and digest not in told.err
    (stated / "tiny.safetensors").unlink()
    (stated / "tiny.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert stated("verify", "--statement", STATEMENT, "tiny.safetensors").code == 0


@pytest.mark.parametrize("name", ["a/b/c", "a/model.safetensors.index.json", "a"])
def test_a_folder_that_is_none(name: str, stated: Folder) -> None:
    """Whatever a statement says that an output is, and whatever is named as that."""
    data = said(stated)
    data["subject"][0]["name"] = name
    data["predicate"]["buildDefinition"]["externalParameters"]["container"] = "diffusers"
    stated.write(STATEMENT, json.dumps(data))
    stated.write(name, "another")
    for file in ("vae.safetensors", "a", "a/", ".", "..", "", "/", "none"):
        told = stated("verify", "--statement", STATEMENT, file)
        assert told.code in ((2,) if not file else (6, 7)) and "Traceback" not in told.err, file
    assert stated("verify", "--statement", STATEMENT).code == 7


def test_the_first_file_that_is_not_there_is_named(stated: Folder) -> None:
    data = said(stated)
    names = ["z.safetensors", *(f"{n}.safetensors" for n in range(20))]
    data["subject"] = [{"name": n, "digest": {"sha256": "0" * 64}} for n in names]
    stated.write("many.json", json.dumps(data))
    assert "there is no `z.safetensors`" in stated("verify", "--statement", "many.json").err


def test_many_files_that_are_not_there(stated: Folder) -> None:
    """A statement of tens of thousands of files costs no more than the first that is missing."""
    data = said(stated)
    digest = {"sha256": "0" * 64}
    data["subject"] = [{"name": f"\x1b{n}/\u202e", "digest": digest} for n in range(30_000)]
    stated.write(STATEMENT, json.dumps(data))
    told = stated("verify", "--statement", STATEMENT)
    assert told.code == 6 and "\x1b" not in told.err and "\u202e" not in told.err and len(told.err) < 1000


# -- read by others


def _read_by_in_toto(text: bytes) -> None:
    """As in-toto's and SLSA's own messages have it: every field is one that they know."""
    json_format = pytest.importorskip("google.protobuf.json_format", reason="protobuf is not installed")
    pb = pytest.importorskip("in_toto_attestation.v1.statement_pb2", reason="in-toto-attestation is not here")
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1.statement import Statement

    statement = json_format.Parse(text, pb.Statement())
    Statement.copy_from_pb(statement).validate()
    predicate = json.loads(text)["predicate"]
    provenance = json_format.ParseDict(predicate, provenance_pb2.Provenance())
    assert provenance.build_definition.build_type == "pkg:pypi/ckpt-build#recipe/v1"
    assert provenance.run_details.builder.id == "pkg:pypi/ckpt-build"
    assert [d.name for d in provenance.build_definition.resolved_dependencies] == ["dirty", "vae"]
    assert provenance.run_details.metadata.started_on.seconds == 1_700_000_000
    assert json_format.MessageToDict(provenance)["runDetails"]["byproducts"] == json.loads(
        json.dumps(predicate["runDetails"]["byproducts"])
    )


def test_in_toto_reads_it() -> None:
    _read_by_in_toto((GOLDEN / "statement.json").read_bytes())


def test_securesystemslib_verifies_it(signed: Folder) -> None:
    """The envelope, both ways: ours by theirs, and theirs by ours."""
    dsse = pytest.importorskip("securesystemslib.dsse", reason="securesystemslib is not installed")
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import CryptoSigner, SSlibKey

    data = json.loads((GOLDEN / "statement-signed.json").read_bytes())
    keyid = data["signatures"][0]["keyid"]
    inner = PrivateKey.read(signed / "key", "--sign").inner
    key = SSlibKey.from_crypto(inner.public_key(), keyid)
    envelope = dsse.Envelope.from_dict(data)
    assert envelope.verify([key], 1) == {keyid: key}
    envelope.payload += b" "
    with pytest.raises(VerificationError):
        envelope.verify([key], 1)

    payload = base64.b64decode(said(signed)["payload"])
    theirs = dsse.Envelope(payload, PAYLOAD, {})
    theirs.sign(CryptoSigner(inner, key))
    signed.write(STATEMENT, json.dumps(theirs.to_dict()))
    assert signed("verify", "--statement", STATEMENT, "--key", "pub").code == 0


def test_sigstore_reads_it(signed: Folder) -> None:
    dsse = pytest.importorskip("sigstore.dsse", reason="sigstore is not installed")
    statement = dsse.Statement((GOLDEN / "statement.json").read_bytes())
    text = (GOLDEN / "statement-signed.json").read_text()
    envelope = dsse.Envelope._from_json(text)
    assert envelope.pae() == statement._pae() == pae(PAYLOAD, (GOLDEN / "statement.json").read_bytes())
    PrivateKey.read(signed / "key", "--sign").inner.public_key().verify(envelope.signature, envelope.pae())

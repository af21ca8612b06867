"""What `ckpt inspect` says of files, to people and to programs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.progress import human_bytes
from builder.cli import run
from builder.formats.checkpoint import Checkpoint
from builder.models.catalog import RANK, Catalog, load_catalog
from builder.reports.inspect import Report, build_report, examine, render
from builder.reports.inspect.positions import read_position_ids
from builder.tensors.lazy import BY_CODE, DType, LazyTensor, MemoryTensor
from tests.help.recipe_words import golden
from tests.help.servers import File, Server

GOLDEN = Path(__file__).parent / "golden" / "inspect"
DOCS = Path(__file__).parents[2] / "docs" / "inspect.md"
CATALOG = load_catalog([])
MINI = ("UNET-mini-SD", "VAE-mini-SD", "CLIP-mini-SD")
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
VAE_OUT = "first_stage_model.decoder.conv_out.bias"

Files = dict[str, tuple[str, tuple[int, ...], bytes]]


def parts(*components: str, dtype: str = "F16", bare: bool = False) -> Files:
    """The tensors of components, each byte told by its name so that contents differ."""
    found: Files = {}
    for name in components:
        component = CATALOG.components[name]
        for inner, rule in component.tensors.items():
            kind = BY_CODE[rule.dtype or dtype]
            data = (
                _ids("q")
                if rule.dtype == "I64"
                else bytes([len(inner) % 60 or 60]) * (prod(rule.shape) * kind.itemsize)
            )
            found[inner if bare else component.prefix + inner] = (kind.code, rule.shape, data)
    return found


def _ids(code: str, **changed: float) -> bytes:
    values: list[float] = list(range(77))
    for place, value in changed.items():
        values[int(place[1:])] = value
    return struct.pack(f"<77{code}", *values)


def write(path: Path, files: Files, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file, written without any library."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (code, shape, data) in files.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(d for _, _, d in files.values()))
    return path


def tidy() -> Files:
    return parts(*MINI)


def dirty() -> Files:
    nai = "cond_stage_model.transformer.embeddings.position_ids"
    return {
        **parts("UNET-mini-SD", "VAE-mini-SD", "CLIP-mini-NAI", "UNET-mini-EMA", dtype="F32"),
        nai: ("F32", (1, 77), _ids("f", _12=11.998, _76=75.9975)),
        "model_ema.decay": ("F32", (), b"\0\0\0\0"),
        "betas": ("F32", (1000,), bytes(4000)),
        "v_pred": ("F32", (0,), b""),
        "first_stage_model.loss.logvar": ("F32", (), bytes(4)),
        "first_stage_model.loss.discriminator.main.0.weight": ("F32", (2, 3), bytes(24)),
        "embedding_manager.\x1b[31m.token": ("F32", (4,), bytes(16)),
    }


def diffusers_vae() -> Files:
    return {
        re.sub(r"attn_1\.([qkv])\.", r"attn_1.to_\1.", name).replace(
            "attn_1.proj_out.", "attn_1.to_out.0."
        ): ((code, shape[:2], data) if ".attn_1." in name and len(shape) == 4 else (code, shape, data))
        for name, (code, shape, data) in parts("VAE-mini-SD", bare=True).items()
    }


CASES: dict[str, Callable[[], Files]] = {
    "tidy": tidy,
    "dirty": dirty,
    "unet-only": lambda: parts("UNET-mini-SD"),
    "only-average": lambda: parts("UNET-mini-EMA", "VAE-mini-SD", "CLIP-mini-SD"),
    "truncated": lambda: {n: t for n, t in tidy().items() if n != "model.diffusion_model.out.2.bias"},
    "stranger": lambda: {"a.weight": ("F32", (2, 2), bytes(16))},
    "empty": dict,
    "diffusers-vae": diffusers_vae,
    "nan": lambda: {**tidy(), VAE_OUT: ("F16", (3,), struct.pack("<3e", 1.0, float("nan"), float("inf")))},
    "overflow": lambda: {**tidy(), VAE_OUT: ("F32", (3,), struct.pack("<3f", 1.0, 70000.0, -65519.0))},
    "two-text-encoders": lambda: parts(*MINI, "CLIP-mini-NAI"),
    "float-ids": lambda: {**tidy(), IDS: ("F32", (1, 77), _ids("f"))},
    "packed": lambda: {**tidy(), "scaled_fp8": ("F8_E4M3", (2,), b"\0\0")},
}
SOUND = {"tidy", "dirty", "diffusers-vae", "overflow", "float-ids", "two-text-encoders", "packed"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CKPT_COMPONENTS", raising=False)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run(["inspect", *args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("case", CASES)
def test_the_short_report(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        here / "model.safetensors",
        CASES[case](),
        {"modelspec.title": "Half \x1b[2J"} if case == "dirty" else None,
    )
    code, out, err = said(capsys, "model.safetensors")
    assert out == golden(GOLDEN / f"{case}.txt", out)
    assert (code, err) == (0 if case in SOUND else 1, "")


def test_the_long_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "model.safetensors", dirty(), {"modelspec.title": "Half \x1b[2J", "long": "x" * 600})
    code, out, _ = said(capsys, "--full", "--hashes", "model.safetensors")
    assert out == golden(GOLDEN / "dirty-full.txt", out)
    assert code == 0


def test_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "model.safetensors", dirty(), {"modelspec.title": "Half \x1b[2J"})
    code, out, _ = said(capsys, "--json", "--hashes", "model.safetensors")
    assert out == golden(GOLDEN / "dirty.json", out)
    assert code == 0 and out.isascii()


def test_json_keeps_its_shape_whatever_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write(here / f"{case}.safetensors", make())) for case, make in CASES.items()]
    (here / "page.ckpt").write_text("<!DOCTYPE html><html>404</html>")
    code, out, err = said(capsys, "--json", *paths, "page.ckpt", "missing.ckpt")
    found = json.loads(out)
    assert (code, err, found["schema"]) == (6, "", 1)
    *files, page, missing = found["files"]
    assert [Path(f["path"]).stem for f in files] == list(CASES)
    for file in files:
        assert _shape(file).items() >= SHAPE.items(), file["path"]
        for component in file["components"]:
            assert _shape(component).items() >= COMPONENT.items()
            assert component["digest"] is None or re.fullmatch("blake3:[0-9a-f]{64}", component["digest"])
        assert file["intact"] == (Path(file["path"]).stem in SOUND | {"nan"})
    for refused in (page, missing):
        assert refused.keys() == {"path", "error"}
        for problem in refused["error"]:
            assert problem.keys() == {"fact", "place", "evidence", "hint"} and problem["fact"]


SHAPE = {
    "path": "str",
    "container": "str",
    "size": "int",
    "intact": "bool",
    "components": "list",
    "known": {"file", "model", "components"},
    "junk": {"keys", "bytes"},
    "ema": {"component", "keys", "bytes"},
    "precision_waste": "int",
    "position_ids": {"tensors", "wrong"},
    "rejected": "list",
    "unknown": "list",
    "globals": "list",
    "metadata": set(),
    "hashes": set(),
}
COMPONENT = {"class": "str", "component": "str", "prefix": "str", "tensors": "int"}


def _shape(value: dict[str, Any]) -> dict[str, Any]:
    return {k: set(v) if isinstance(v, dict) else type(v).__name__ for k, v in value.items()}


def test_every_field_of_the_json_is_documented(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "a.safetensors", dirty())
    write(
        here / "b.safetensors", {n: t for n, t in tidy().items() if n != "model.diffusion_model.out.2.bias"}
    )
    write(here / "c.safetensors", CASES["nan"]())
    _, out, _ = said(capsys, "--json", "a.safetensors", "b.safetensors", "c.safetensors", "missing")
    documented = set(re.findall(r"`([a-z_]+)`", DOCS.read_text(encoding="utf-8")))
    fields = {key for file in json.loads(out)["files"] for key in file}
    for file in json.loads(out)["files"]:
        for key in ("components", "rejected", "faults"):
            fields |= {k for row in file.get(key, []) for k in row}
        for key in ("known", "junk", "ema", "position_ids"):
            fields |= set(file.get(key, {}))
        fields |= {k for row in file.get("position_ids", {}).get("wrong", []) for k in row}
    assert not fields - documented


def test_no_metric_reads_contents_only_and_never_imports_torch(here: Path) -> None:
    write(here / "model.safetensors", dirty())
    code = (
        "import sys\nfrom builder.cli import run\n"
        "code = run(['inspect', '--no-metric', 'model.safetensors'])\n"
        "heavy = {'torch', 'numpy', 'networkx'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "SD-mini" in done.stdout and "metric" not in done.stdout


def test_a_refused_file_is_told_of_and_the_others_are_inspected(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here / "unet.safetensors", parts("UNET-mini-SD"))
    (here / "page.ckpt").write_text("<!DOCTYPE html><html>404</html>")
    code, out, err = said(capsys, "--no-metric", "page.ckpt", "unet.safetensors")
    assert code == 6
    assert err.startswith("error: this is no checkpoint but") and "page.ckpt" in err
    assert out.startswith("unet.safetensors\nUNET-mini-BROKEN")


@pytest.mark.parametrize("args", [[], ["--nometric", "x"], ["--full", "--wrong"]])
def test_wrong_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, *args)
    assert (code, out) == (2, "") and err.startswith("error: ")


def test_names_out_of_a_file_never_drive_the_terminal(here: Path) -> None:
    hostile = "\x1b]0;owned\x07\u202emodel\n\tname"
    files = {**tidy(), hostile: ("F32", (1,), bytes(4)), f"loss.{hostile}": ("F32", (1,), bytes(4))}
    path = write(here / "model.safetensors", files, {hostile: hostile})
    report = build_report(path, catalog=CATALOG, metric=False)
    for full in (False, True):
        for width in (None, 80):
            text = render(report, full=full, width=width).replace("\n", "")
            assert text.isprintable() and "owned" in text


class Unread(LazyTensor):
    def read_into(self, start: int, out: memoryview) -> None:
        raise AssertionError("read")


def contents(*components: str, catalog: Catalog = CATALOG, bare: bool = False, rank: int = 4) -> Report:
    """What is said of a file by its table of contents alone."""
    tensors: dict[str, LazyTensor] = {}
    for name in components:
        component = catalog.components[name]
        for inner, rule in component.tensors.items():
            shape = tuple(rank if n == RANK else n for n in rule.shape)
            tensors[inner if bare else component.prefix + inner] = Unread(DType.F16, shape)
    tensors = {n: t for n, t in tensors.items() if not n.endswith("position_ids")}
    checkpoint = Checkpoint("model", "torch-zip", 1, tensors, globals=("a.b", "c.d", "e.f"))
    return examine(checkpoint, catalog, metric=False)


def test_bare_components_that_make_nothing_together() -> None:
    report = contents("UNET-mini-SD", "VAE-mini-SD", bare=True)
    (fault,) = report.faults
    assert fault.fact == "components without prefixes that make no architecture together: UNET-mini, VAE-mini"
    assert not report.sound


def test_a_component_that_no_architecture_has(here: Path) -> None:
    table = 'name = "Mine"\nclass = "M"\nprefix = "mine."\nkeys = 1\nparameters = 2\n[tensors]\na = [2]\n'
    (here / "mine").mkdir()
    (here / "mine" / "m.toml").write_text(table)
    (fault,) = contents("Mine", catalog=load_catalog([here / "mine"])).faults
    assert fault.fact == "the component is prefixed as in a full checkpoint, but no architecture has it"


def test_a_rejected_component_is_told_with_its_reason(here: Path) -> None:
    files = tidy() | {VAE_OUT: ("F16", (4,), bytes(8))}
    report = build_report(write(here / "model.safetensors", files), catalog=CATALOG, metric=False)
    (fault,) = report.faults
    assert fault.fact == "not a whole SD-mini: VAE-mini not as it should be"
    where, shapes = "`VAE-mini-SD` under `first_stage_model.`", "`decoder.conv_out.bias` is [4], not [3]"
    assert fault.evidence == (f"nearest: {where}: 247 of 248 tensors; {shapes}",)


def test_loras_have_a_rank_and_say_what_else_they_fit() -> None:
    text = render(contents("LoRA-v1A-CLIP", rank=4), full=True)
    assert "  rank 4\n" in text
    assert "  `LoRA-v1-CLIP`: 144 of 144 tensors, all part of `LoRA-v1A-CLIP`\n" in text
    assert "  3 globals, none run: a.b, c.d, e.f\n" in text.replace("pickle   ", "")


def test_a_remark_goes_below_where_there_is_no_room() -> None:
    lines = render(contents("LoRA-v1A-CLIP"), width=56).splitlines()
    assert lines[lines.index("    rank 4") - 1].lstrip().startswith("LoRA-v1-CLIP  LoRA-v1A-CLIP")


def test_integers_for_weights_are_told_of(here: Path) -> None:
    files = tidy() | {VAE_OUT: ("I8", (3,), bytes(3))}
    report = build_report(write(here / "model.safetensors", files), catalog=CATALOG, metric=False)
    (fault,) = report.faults
    assert fault.fact == "integers where `VAE-mini-SD` has weights: 1 tensor"
    assert fault.evidence == (f"I8: `{VAE_OUT}`",)


def test_one_integer_is_no_quantized_weight(here: Path) -> None:
    """SD v2 files have an I64 `logit_scale`."""
    clip = CATALOG.components["CLIP-v2-SD"]
    tensors: dict[str, LazyTensor] = {
        n: MemoryTensor(DType.I64, (), bytes(8)) if n == "logit_scale" else Unread(DType.F16, rule.shape)
        for n, rule in clip.tensors.items()
    }
    report = examine(Checkpoint("clip.safetensors", "safetensors", 0, tensors), CATALOG, metric=False)
    assert report.identity.architecture == "CLIP-v2"
    assert report.faults == ()


def test_names_without_end_are_cut(here: Path) -> None:
    endless = "x" * 1_000_000
    path = write(here / "model.safetensors", {endless: ("F32", (1,), bytes(4))}, {endless: endless})
    text = render(build_report(path, catalog=CATALOG, metric=False), full=True, width=80)
    assert len(text) < 20_000 and "(1,000,0" in text


@settings(max_examples=25)
@given(width=st.integers(60, 200), case=st.sampled_from(sorted(CASES)), full=st.booleans())
def test_no_line_is_wider_than_the_terminal(
    width: int, case: str, full: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{case}.safetensors"
    if not path.exists():
        write(path, CASES[case]())
    report = build_report(path, catalog=CATALOG, metric=False)
    lines = render(report, full=full, width=width).splitlines()[1:]  # a path is never broken
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", render(report, full=full, width=width, color=True))
    assert plain == render(report, full=full, width=width)


def test_digests_know_contents_and_not_files(here: Path) -> None:
    one = build_report(write(here / "one.safetensors", tidy()), catalog=CATALOG)
    other = dict(reversed(tidy().items()))
    code, shape, data = other[VAE_OUT]
    other[VAE_OUT] = (code, shape, bytes(len(data)))
    two = build_report(write(here / "two.safetensors", other), catalog=CATALOG)
    bare = build_report(write(here / "clip.safetensors", parts("CLIP-mini-SD", bare=True)), catalog=CATALOG)
    first, second = ({p.match.component.name: p.digest for p in r.parts} for r in (one, two))
    assert first["UNET-mini-SD"] == second["UNET-mini-SD"]
    assert first["VAE-mini-SD"] != second["VAE-mini-SD"]
    assert bare.parts[0].digest == first["CLIP-mini-SD"]


def test_sizes_add_up(here: Path) -> None:
    files = dirty()
    report = build_report(write(here / "model.safetensors", files), catalog=CATALOG, metric=False)
    total = sum(len(data) for _, _, data in files.values())
    kept = total - report.ema.bytes - report.junk.bytes
    kept -= len(files["model_ema.decay"][2])
    assert kept - report.precision_waste + 77 * (8 - 4) == report.pruned, "position_ids become int64"
    assert report.ema.keys == 686 and report.junk.keys == 2 and report.junk.bytes == 28


NUMBERS = [d for d in DType if d.bits >= 8 and d.torch_name and d.floating and "FNUZ" not in d.code]


@pytest.mark.parametrize("dtype", [d for d in NUMBERS if d.code != "F8_E8M0"], ids=lambda d: d.code)
def test_position_ids_are_read_as_torch_reads_them(dtype: DType) -> None:
    import torch

    values = torch.arange(77).to(torch.float64) * 1.01 - 0.4
    held = values.to(dtype.torch)
    data = bytes(held.view(torch.uint8).flatten().tolist())
    ids = read_position_ids({"embeddings.position_ids": MemoryTensor(dtype, (1, 77), data)})
    expected = held.to(torch.float64).tolist()
    assert [(p.position, p.value, p.loaded) for p in ids.wrong] == [
        (at, value, int(value)) for at, value in enumerate(expected) if value != at
    ]


@pytest.mark.parametrize(
    ("dtype", "code", "odd"), [("F64", "d", 1e300), ("F64", "d", -(2.0**64)), ("U64", "Q", 2**63)]
)
def test_what_no_integer_holds_loads_as_nothing(dtype: str, code: str, odd: float) -> None:
    data = struct.pack(f"<77{code}", odd, *range(1, 77))
    (wrong,) = read_position_ids({IDS: MemoryTensor(BY_CODE[dtype], (1, 77), data)}).wrong
    assert (wrong.value, wrong.loaded, wrong.harmful) == (odd, None, True)


def test_position_ids_of_any_other_count_are_not_read() -> None:
    ids = read_position_ids({IDS: Unread(DType.F32, (1, 10**12)), "other": Unread(DType.F32, (1,))})
    assert (list(ids.tensors), ids.odd, ids.wrong) == ([IDS], (IDS,), ())


@pytest.mark.parametrize("color", [True, False])
def test_a_terminal_gets_colour_unless_it_is_not_wanted(here: Path, color: bool) -> None:
    pty = pytest.importorskip("pty")
    write(here / "model.safetensors", tidy())
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "NO_COLOR": "" if color else "1"}
    command = [sys.executable, "-m", "builder", "inspect", "--no-metric", "model.safetensors"]
    done = subprocess.run(command, cwd=here, stdout=slave, stderr=subprocess.PIPE, env=env)
    os.close(slave)
    out = os.read(master, 1 << 16)
    os.close(master)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (b"\x1b[1;32mSD-mini\x1b[0m" in out) == color


def test_safetensors_and_pytorch_files_of_the_same_tensors_say_the_same(here: Path) -> None:
    import torch

    tensors = {
        name: torch.frombuffer(bytearray(data), dtype=BY_CODE[code].torch).reshape(shape)
        for name, (code, shape, data) in tidy().items()
    }
    torch.save({"state_dict": tensors, "epoch": 3}, "model.ckpt")
    torch.save(tensors, "old.pt", _use_new_zipfile_serialization=False)
    first, *others = (
        build_report(path, catalog=CATALOG)
        for path in (write(here / "model.safetensors", tidy()), "model.ckpt", "old.pt")
    )
    assert [r.container for r in others] == ["torch-zip", "torch-legacy"]
    for other in others:
        assert other.identity == first.identity and other.metric == first.metric
        assert [p.digest for p in other.parts] == [p.digest for p in first.parts]
    assert others[0].nesting == "state_dict" and others[0].others.keys() == {"epoch"}
    assert "collections.OrderedDict" in others[1].globals or others[1].globals


def sparse(path: Path, *components: str, without: str = "?", **written: bytes) -> Path:
    """A full-size safetensors file whose data is a hole, but for what is `written` into tensors by name."""
    header: dict[str, Any] = {}
    at = 0
    for component in map(CATALOG.components.__getitem__, components):
        for inner, rule in component.tensors.items():
            if inner.endswith(without):
                continue
            code = rule.dtype or "F16"
            end = at + prod(rule.shape) * BY_CODE[code].itemsize
            header[component.prefix + inner] = {"dtype": code, "shape": rule.shape, "data_offsets": [at, end]}
            at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
        for name, data in written.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(data)
    return path


@pytest.mark.parametrize(
    ("components", "architecture"),
    [
        (("UNET-v1-SD", "VAE-v1-SD", "CLIP-v1-SD"), "SD-v1"),
        (("UNET-v2-SD", "VAE-v1-SD", "CLIP-v2-WD"), "SD-v2"),
        (("UNET-XL-SD", "VAE-v1-SD", "CLIP-XL-SD", "CLIP-XL-AUX-SD"), "SD-XL"),
        (("UNET-XL-Refiner", "VAE-v1-SD", "CLIP-XL-Refiner"), "SD-XL-Refiner"),
        (("MMDIT-v3-SD", "VAE-v3-SD", "CLIP-L-v3", "CLIP-G-v3", "T5-XXL-v3"), "SD-v3"),
        (("DIT-FLUX-dev", "VAE-FLUX", "CLIP-L-FLUX", "T5-XXL-FLUX"), "FLUX"),
    ],
)
def test_full_size_checkpoints_by_their_tables_of_contents(
    components: tuple[str, ...], architecture: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = next((n for n in ("CLIP-v1-SD", "CLIP-XL-AUX-SD") if n in components), None)
    written = {CATALOG.components[ids].prefix + "embeddings.position_ids": _ids("q", _76=75)} if ids else {}
    sparse(here / "model.safetensors", *components, **written)
    code, out, err = said(capsys, "--no-metric", "--json", "model.safetensors")
    (found,) = json.loads(out)["files"]
    assert (code, err) == (0, "")
    assert (found["architecture"], found["intact"]) == (architecture, True)
    assert [c["component"] for c in found["components"]] == list(components)
    assert found["unknown"] == [] and found["precision_waste"] == 0
    assert [(w["position"], w["value"], w["loaded"]) for w in found["position_ids"]["wrong"]] == (
        [(76, 75, 75)] if ids else []
    )


def test_sd_xl_without_position_ids_is_whole(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts_ = ("UNET-XL-SD", "VAE-v1-SD", "CLIP-XL-SD", "CLIP-XL-AUX-SD")
    sparse(here / "model.safetensors", *parts_, without="position_ids")
    code, out, _ = said(capsys, "--no-metric", "model.safetensors")
    assert code == 0
    assert out.startswith("model.safetensors\nSD-XL · safetensors · 6.9 GB\n")


def test_known_weights_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    # Weights of any kind whose sum of sigmoid(x) - 0.5 is that of the NAI VAE have its digits.
    target, count = 17870.7051 * 1.29825, 512 * 512 * 9
    values = np.array([0.03930, 0.03940], np.float16)
    low, high = 1 / (1 + np.exp(-values.astype(np.float64))) - 0.5
    many = round((target - low * count) / (high - low))
    weights = np.where(np.arange(count) < many, values[1], values[0])
    name = "first_stage_model.decoder.mid.block_1.conv1.weight"
    sparse(here / "nai.safetensors", "VAE-v1-SD", **{name: weights.tobytes()})
    code, out, _ = said(capsys, "nai.safetensors")
    assert code == 1
    assert "metric     (----/2982/----)" in out and "167 MB  NAI VAE\n" in out
    _, out, _ = said(capsys, "--json", "nai.safetensors")
    assert json.loads(out)["files"][0]["known"]["components"] == {"VAE-v1-SD": "NAI"}


def test_known_contents_are_named_by_their_digest(here: Path) -> None:
    path = write(here / "vae.safetensors", parts("VAE-mini-SD", bare=True))
    digest = build_report(path, catalog=CATALOG).parts[0].digest
    known = here / "mine" / "known"
    known.mkdir(parents=True)
    (known / "parts.toml").write_text(
        f'[[component]]\nname = "Small"\nclass = "VAE-mini"\nblake3 = "{digest}"\nfix = "Small-fp16"\n'
    )
    report = build_report(write(here / "model.safetensors", tidy()), catalog=load_catalog([here / "mine"]))
    assert [p.known for p in report.parts] == [None, "Small", None]
    assert "171 kB  Small VAE\n" in render(report)
    assert [f.fact for f in report.faults] == ["these are the weights of `Small`"]


def test_a_known_metric_is_named(here: Path) -> None:
    path = write(here / "model.safetensors", tidy())
    metric = build_report(path, catalog=CATALOG).metric
    assert metric is not None and metric.text.replace("/", "").isdigit()
    known = here / "mine" / "known"
    known.mkdir(parents=True)
    (known / "models.toml").write_text(f'[[metric]]\nname = "Small"\nvalue = "{metric.text}"\n')
    report = build_report(path, catalog=load_catalog([here / "mine"]))
    assert f"metric     ({metric.text}), which is that of Small\n" in render(report) + "\n"


def test_a_known_file_is_named_and_what_is_known_of_it(here: Path, tmp_path: Path) -> None:
    path = write(here / "vae.safetensors", parts("VAE-mini-SD", bare=True))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    known = tmp_path / "mine" / "known"
    known.mkdir(parents=True)
    (known / "files.toml").write_text(
        f'[[file]]\nname = "mine.vae"\nsha256 = "{sha256}"\nnote = "overflows"\nfix = "mine-fixed.vae"\n'
    )
    catalog = load_catalog([tmp_path / "mine"])
    assert build_report(path, catalog=catalog, metric=False).published is None
    report = build_report(path, catalog=catalog, metric=False, hashes=True)
    assert "published  as mine.vae\n" in render(report) and report.hashes["SHA256"] == sha256
    (fault,) = report.faults
    assert "mine.vae" in fault.fact and fault.evidence == ("overflows",)
    assert fault.hint is not None and "mine-fixed.vae" in fault.hint


@given(st.floats(0, 1e16))
def test_sizes_are_short(count: float) -> None:
    number, unit = human_bytes(count).split()
    assert len(number) <= 5 or unit == "TB"
    scale = 1000.0 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert float(number) * scale == pytest.approx(count, rel=0.06, abs=0.5)


def test_a_file_on_a_host_is_inspected_by_its_table_of_contents(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_ALLOW_PRIVATE", "1")
    path = write(here / "model.safetensors", {**tidy(), "padding": ("U8", (4 << 20,), bytes(4 << 20))})
    with Server() as server:
        server.routes["/model.safetensors"] = File(path.read_bytes())
        code, out, err = said(capsys, "--json", server.url("/model.safetensors"), server.url("/none"))
        (found, missing) = json.loads(out)["files"]
        assert (code, err, server.sent < 1 << 20) == (5, "", True)
        assert (found["architecture"], found["size"]) == ("SD-mini", path.stat().st_size)
        assert found["metric"] is None and found["position_ids"]["wrong"] == []
        assert "404" in missing["error"][0]["fact"]
        assert said(capsys, "--hashes", server.url("/model.safetensors"))[0] == 2


def test_a_sharded_set_is_one_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = list(tidy().items())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {}
    for name, some in zip(names, (files[:500], files[500:]), strict=True):
        write(here / name, dict(some))
        places |= {tensor: name for tensor, _ in some}
    (here / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    code, out, err = said(capsys, "--json", "--hashes", ".")
    (found,) = json.loads(out)["files"]
    assert (code, err, found["architecture"], found["hashes"]) == (0, "", "SD-mini", {})
    assert found["container"] == "safetensors-sharded"
    assert found["size"] >= sum((here / n).stat().st_size for n in names)

"""GGUF files: what the reference writes is read as it reads it, and what is none is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from builder.base.errors import SourceError
from builder.formats import open_checkpoint
from builder.tensors.lazy import DType
from tests.help.building import Folder
from tests.help.gguf_files import PACKED, Types, info, key, random_blocks, raw, text, write


def opened(tmp_path: Path, data: bytes) -> dict[str, Any]:
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    with open_checkpoint(path) as checkpoint:
        return {n: bytes(t.tobytes()) for n, t in checkpoint.items()}


def refused(tmp_path: Path, data: bytes) -> str:
    """What is said of a file that cannot be opened."""
    with pytest.raises(SourceError) as caught:
        opened(tmp_path, data)
    (problem,) = caught.value.problems
    return " / ".join([problem.fact, *problem.evidence, problem.hint or ""])


def test_all_types_of_the_reference(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "F32": chance.standard_normal((3, 5)).astype("f4"),
        "F16": chance.standard_normal((2, 3, 4)).astype("f2"),
        "F64": chance.standard_normal(7),
        "I8": np.arange(5, dtype="i1"),
        "I16": np.arange(5, dtype="i2"),
        "I32": np.arange(5, dtype="i4"),
        "I64": np.arange(5, dtype="i8"),
        "BF16": ("BF16", (2, 4), np.arange(8, dtype="<u2").tobytes()),
    }
    for kind in PACKED:
        width = gguf.GGML_QUANT_SIZES[Types[kind]][0]
        tensors[kind] = (kind, (3, 2 * width), random_blocks(kind, 6).tobytes())
    path = write(tmp_path / "all.gguf", tensors, values={"general.name": "né", "x.flag": True, "x.n": 3})
    reference = {t.name: t for t in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == "gguf"
        assert checkpoint.metadata == {"general.architecture": "flux", "general.name": "né"}
        assert checkpoint.others == {"x.flag": "True", "x.n": "3"}
        assert list(checkpoint) == list(reference) == list(tensors)
        for name, tensor in checkpoint.items():
            held = reference[name]
            assert tensor.shape == tuple(int(n) for n in reversed(held.shape))
            assert tensor.stored == (name, held.n_bytes)
            if name in PACKED:
                wanted = gguf.quants.dequantize(held.data, held.tensor_type).tobytes()
                assert tensor.dtype is DType.F32 and tensor.computed
            else:
                wanted = held.data.tobytes()
                assert tensor.dtype.code == name
            assert bytes(tensor.tobytes()) == wanted, name


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(tmp_path: Path, version: int) -> None:
    data = raw([], [info("a", (2, 3))], np.arange(6, dtype="f4").tobytes(), version=version)
    assert opened(tmp_path, data) == {"a": np.arange(6, dtype="f4").tobytes()}


def test_a_shape_that_was_stored_in_another(tmp_path: Path) -> None:
    values = np.arange(512, dtype="f4")
    shape = [2, 1, 2, 128]
    keys = {"comfy.gguf.orig_shape.a": shape}
    path = write(tmp_path / "a.gguf", {"a": values.reshape(2, 256)}, values=keys)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint["a"].shape == tuple(shape)
        assert bytes(checkpoint["a"].tobytes()) == values.tobytes()
        assert not checkpoint.others


def test_five_dimensions(tmp_path: Path) -> None:
    values = np.arange(120, dtype="f4").reshape(1, 2, 3, 4, 5)
    with open_checkpoint(write(tmp_path / "a.gguf", {"a": values})) as checkpoint:
        assert checkpoint["a"].shape == values.shape


def test_another_alignment(tmp_path: Path) -> None:
    keys = [key("general.alignment", 4, struct.pack("<I", 8))]
    data = raw(keys, [info("a", (2,)), info("b", (1,), 0, 8)], struct.pack("<3f", 1, 2, 3))
    assert opened(tmp_path, data) == {"a": struct.pack("<2f", 1, 2), "b": struct.pack("<f", 3)}


def test_values_of_every_type_and_nested_arrays(tmp_path: Path) -> None:
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    keys = [key(f"n{k}", k, struct.pack("<" + form, 1)) for k, form in numbers.items()]
    array = struct.pack("<IQ", 8, 2) + text("a") + text("\xff")
    keys.append(key("strings", 9, array))
    keys.append(key("nested", 9, struct.pack("<IQ", 9, 2) + array + struct.pack("<IQ2d", 12, 2, 1, 2)))
    keys.append(key("long", 8, text("x" * 70_000)))
    path = tmp_path / "a.gguf"
    path.write_bytes(raw(keys, [info("a")], bytes(16)))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {}
        assert checkpoint.others == {
            **{f"n{k}": {6: "1.0", 12: "1.0", 7: "True"}.get(k, "1") for k in numbers},
            "strings": "an array of 2 values",
            "nested": "an array of 2 values",
            "long": "a text of 70,000 bytes",
        }


# Text encoders, as llama.cpp names them.


def test_names_of_a_t5_encoder(tmp_path: Path) -> None:
    one = np.ones(2, dtype="f4")
    names = {
        "token_embd.weight": "shared.weight",
        "enc.output_norm.weight": "encoder.final_layer_norm.weight",
        "enc.blk.0.attn_rel_b.weight": (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        "enc.blk.11.attn_o.weight": "encoder.block.11.layer.0.SelfAttention.o.weight",
        "enc.blk.11.attn_norm.weight": "encoder.block.11.layer.0.layer_norm.weight",
        "enc.blk.11.ffn_gate.weight": "encoder.block.11.layer.1.DenseReluDense.wi_0.weight",
        "enc.blk.11.ffn_up.weight": "encoder.block.11.layer.1.DenseReluDense.wi_1.weight",
        "enc.blk.11.ffn_down.weight": "encoder.block.11.layer.1.DenseReluDense.wo.weight",
        "enc.blk.11.ffn_norm.weight": "encoder.block.11.layer.1.layer_norm.weight",
    }
    path = write(tmp_path / "a.gguf", dict.fromkeys(names, one), "t5encoder")
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == list(names.values())
    with open_checkpoint(write(tmp_path / "b.gguf", dict.fromkeys(names, one), "gemma2")) as checkpoint:
        assert list(checkpoint) == list(names)


def test_names_that_the_references_map_has(tmp_path: Path) -> None:
    """Each of a decoder's names is the one that the reference's map leads to it from."""
    back = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output")
    parts += ("ffn_norm", "ffn_up", "ffn_down", "ffn_gate")
    names = [*(f"blk.1.{p}.weight" for p in parts), *(f"{n}.weight" for n in ("token_embd", "output_norm"))]
    path = write(tmp_path / "a.gguf", {n: np.ones(2, dtype="f4") for n in names}, "qwen3")
    with open_checkpoint(path) as checkpoint:
        assert {back.get_name(n, (".weight",)) for n in checkpoint} == set(names)
        assert "model.layers.1.self_attn.q_norm.weight" in checkpoint
    t5 = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    parts = ("attn_q", "attn_k", "attn_v", "attn_o", "attn_norm", "attn_rel_b")
    parts += ("ffn_norm", "ffn_up", "ffn_down", "ffn_gate")
    names = [*(f"enc.blk.1.{p}.weight" for p in parts), "token_embd.weight", "enc.output_norm.weight"]
    path = write(tmp_path / "b.gguf", {n: np.ones(2, dtype="f4") for n in names}, "t5encoder")
    with open_checkpoint(path) as checkpoint:
        assert {t5.get_name(n, (".weight",)) for n in checkpoint} == set(names)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_the_heads_of_llama_are_put_in_order(tmp_path: Path, kind: str) -> None:
    def permuted(weights: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
        """As llama.cpp's conversion does it."""
        halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        return halves.swapaxes(1, 2).reshape(weights.shape)

    chance = np.random.default_rng(0)
    values = {n: chance.integers(-127, 128, (r, 32)).astype("f4") for n, r in (("q", 16), ("k", 8), ("v", 8))}
    for held in values.values():
        held[:, 0] = 127  # so that Q8_0 holds each number
    stored = {"q": permuted(values["q"], 4), "k": permuted(values["k"], 2), "v": values["v"]}
    tensors = {
        f"blk.0.attn_{n}.weight": (kind, v.shape, gguf.quants.quantize(v, Types[kind]).tobytes())
        for n, v in stored.items()
    }
    keys = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    with open_checkpoint(write(tmp_path / "a.gguf", tensors, "llama", keys)) as checkpoint:
        for name, wanted in values.items():
            tensor = checkpoint[f"model.layers.0.self_attn.{name}_proj.weight"]
            assert tensor.stored[0] == kind
            assert bytes(tensor.tobytes()) == wanted.tobytes()
            out = bytearray(200)
            tensor.read_into(60, memoryview(out))
            assert bytes(out) == wanted.tobytes()[60:260]


@pytest.mark.parametrize("heads", [None, 0, 3, [4, 4], 2.0])
@pytest.mark.parametrize("part", ["q", "k"])
def test_heads_of_llama_that_nothing_tells_are_not_guessed(tmp_path: Path, part: str, heads: Any) -> None:
    count = "llama.attention.head_count"
    keys = {count: 4, f"{count}_kv": heads} if part == "k" else {count: heads}
    said = {k: v for k, v in keys.items() if v is not None}
    path = write(tmp_path / "a.gguf", {f"blk.0.attn_{part}.weight": np.ones((16, 32), "f4")}, "llama", said)
    if len(said) == 1 and part == "k":  # as many keys as queries
        open_checkpoint(path).close()
        return
    with pytest.raises(SourceError, match="does not tell the heads of"):
        open_checkpoint(path).close()


# Hostile files.

ONE = [info("a")]
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing behind the magic": (b"GGUF", "reaches past the end"),
    "cut in its counts": (raw()[:20], "reaches past the end"),
    "version 1": (raw(version=1), "of version 1"),
    "version 4": (raw(version=4), "of version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "more tensors than bytes": (raw(counts=(1 << 63, 0)), "too many entries"),
    "more keys than any": (raw(counts=(0, 1 << 40)), "too many entries"),
    "fewer keys than told": (raw([key("a", 4, bytes(4))], counts=(0, 2)), "a key without a name"),
    "a key of no end": (raw([struct.pack("<Q", 1 << 60)]), "too long"),
    "a key that is no text": (raw([key(b"\xff", 4, bytes(4))]), "is not UTF-8"),
    "a text that is none": (raw([key("a", 8, text(b"\xff"))]), "the value of `a` is not UTF-8"),
    "a key twice": (raw([key("a", 4, bytes(4))] * 2), "the key `a` twice"),
    "a key of no type": (raw([key("a", 13, bytes(4))]), "an unknown type"),
    "an array of no type": (raw([key("a", 9, struct.pack("<IQ", 99, 1))]), "values of an unknown type"),
    "an array that nests": (raw([key("a", 9, struct.pack("<IQ", 9, 1) * 9)]), "nested too deeply"),
    "one of several": (raw([key("split.count", 2, struct.pack("<H", 3))], ONE), "one of several"),
    "a tensor twice": (raw([], [info("a"), info("a", start=32)], bytes(64)), "names tensor `a` twice"),
    "a tensor of no name": (raw([], [info("")], bytes(16)), "is empty"),
    "a tensor named NUL": (raw([], [info("a\0")], bytes(16)), "NUL"),
    "many dimensions": (raw([], [info("a", (1,) * 9)], bytes(16)), "too many dimensions"),
    "a shape beyond all": (raw([], [info("a", (1 << 32, 1 << 31))], bytes(16)), "overflows"),
    "rows that are no blocks": (raw([], [info("a", (33, 2), 8)], bytes(99)), "no whole blocks"),
    "a single number in blocks": (raw([], [info("a", (), 8)], bytes(99)), "no whole blocks"),
    "out of alignment": (raw([], [info("a", start=4)], bytes(99)), "out of alignment"),
    "an overlap": (raw([], [info("a", (16,)), info("b", start=32)], bytes(99)), "overlap"),
    "two at one place": (raw([], [info("a"), info("b")], bytes(99)), "overlap"),
    "an end past the file": (raw([], ONE, bytes(15)), "ends before its tensors do"),
    "no data at all": (raw([], ONE)[:-5], "ends before its tensors do"),
    "an offset past all": (raw([], [info("a", start=1 << 63)], bytes(99)), "ends before its tensors do"),
    "alignment of zero": (raw([key("general.alignment", 4, bytes(4))], ONE), "no power of two"),
    "alignment as text": (raw([key("general.alignment", 8, text("32"))], ONE), "no power of two"),
    "IQ4_XS": (raw([], [info("a", (256,), 23), *ONE[:0]], bytes(999)), "packed as IQ4_XS"),
    "an unknown type": (raw([], [info("a", (256,), 99)], bytes(999)), "packed as type 99"),
    "a shape of another size": (
        raw([key("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ2i", 5, 2, 5, 5))], ONE, bytes(16)),
        "no shape of its tensor",
    ),
    "a shape that turns back": (
        raw([key("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ2i", 5, 2, -2, -2))], ONE, bytes(16)),
        "no shape of its tensor",
    ),
    "a shape of nothing": (
        raw([key("comfy.gguf.orig_shape.b", 9, struct.pack("<IQ2i", 5, 2, 2, 2))], ONE, bytes(16)),
        "there is no such tensor",
    ),
    "a shape as text": (
        raw([key("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ", 8, 1) + text("4"))], ONE, bytes(16)),
        "is no shape",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_good_file(tmp_path: Path, name: str) -> None:
    data, fact = REFUSED[name]
    assert fact in refused(tmp_path, data)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.gguf", {"a": np.ones((2, 2), dtype="f4")}, values={"b": [1, 2], "c": "d"})
    data = whole.read_bytes()
    end = len(data) - 16  # what comes behind the last tensor is padding
    for size in range(4, end):
        assert refused(tmp_path, data[:size]), size
    assert opened(tmp_path, data[:end])


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    said = refused(tmp_path, raw([], [info("a", (256,), 23), info("b", (256,), 23), info("c", (32,), 39)]))
    assert said == (
        "the GGUF file is packed as IQ4_XS and MXFP4, which is not read / 2 tensors as `a`: IQ4_XS / "
        "1 tensor as `c`: MXFP4 / take the model as one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, "
        "Q5_K, Q6_K, or as F16 or BF16"
    )


def test_commands_say_of_each_what_is_wrong(tmp_path: Path) -> None:
    folder = Folder.below(tmp_path)
    for name, (data, fact) in REFUSED.items():
        (folder / "a.gguf").write_bytes(data)
        for words in (("inspect", "a.gguf"), ("convert", "a.gguf", "-o", "a.safetensors")):
            said = folder(*words)
            assert said.code == 6, name
            assert fact in " ".join((said.out + said.err).split()), name
            assert "Traceback" not in said.out + said.err, name
    assert not (folder / "a.safetensors").exists()

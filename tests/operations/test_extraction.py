"""LoRAs that are extracted of models, and resized: held against what others computed, and used again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from builder.formats import open_checkpoint
from builder.models.catalog import load_catalog
from builder.operations.lora.extract import Factors, extracted_rank, resized_rank
from builder.operations.lora.names import Shaped, extracted, targets
from builder.tensors.lazy import LazyTensor
from tests.help.building import CLIP, UNET, Folder, catalog, content, model, save, values
from tests.help.network import hosts, sha256
from tests.help.servers import hugging_face

HELD = json.loads(Path(__file__).with_name("extraction.json").read_text(encoding="utf-8"))


def matrix(of: str) -> torch.Tensor:
    shape, numbers = HELD[of]
    return torch.tensor(numbers, dtype=torch.float64).view(shape).flatten(1)


def product(factors: Factors) -> torch.Tensor:
    up, down = factors.get()
    return up.view(factors.shape[0], -1).double() @ down.view(-1, factors.shape[1]).double()


@pytest.mark.parametrize(
    "case", HELD["cases"], ids=lambda c: f"{c['by']} {c['of']} {c['method']} {c['param']}"
)
def test_as_others_extract_and_resize(case: Mapping[str, Any]) -> None:
    """Products agree, not factors: theirs are FP32."""
    whole = matrix(case["of"])
    rows, columns = whole.shape
    params = {case["method"]: case["param"]} if case["method"] else {}
    factors = Factors("m", lambda: [whole], (rows, columns))
    if "most" in case:
        rank = resized_rank(factors.values(), params, min(case["most"], rows), rows)
        assert case["alpha"] == rank * 0.5
    else:
        rank = extracted_rank(factors.values(), params, rows if params else int(case["param"]))
    if case["rank"] is None:
        assert 2 * rank >= rows  # the difference is stored as it is
        return
    assert rank == case["rank"]
    expected = torch.tensor(case["product"], dtype=torch.float64).view(rows, columns)
    factors.rank = rank
    assert (product(factors) - expected).abs().max() < 5e-6
    # The same matrix as a product, as a LoRA's file has it.
    left, right = torch.linalg.qr(whole)
    again = Factors("m", lambda: [left, right], (rows, columns), rank)
    assert torch.allclose(again.values(), torch.linalg.svdvals(whole), atol=1e-12)
    assert (product(again) - expected).abs().max() < 5e-6


def noisy(rows: int, columns: int, rank: int) -> torch.Tensor:
    """A change of so many directions between two models in FP32, with what their rounding adds to it."""
    generator = torch.Generator().manual_seed(rows)
    weight, left, right = (
        torch.randn(*shape, generator=generator) for shape in ((rows, columns), (rows, rank), (rank, columns))
    )
    return (weight + left @ right * 0.1).double() - weight.double()


EXACT = {
    "linear": matrix("linear"),
    "conv": matrix("conv"),
    "wide": noisy(40, 90, 3),
    "tall": noisy(90, 40, 3),
    "nothing": torch.zeros(8, 12, dtype=torch.float64),
    "signs alike": torch.tensor([[1.0, -2.0], [-1.0, 2.0]], dtype=torch.float64),
    "next to nothing": torch.diag(torch.tensor([3.0, 2.0, 2e-5, 1e-15], dtype=torch.float64)),
}


def by_numpy(whole: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.linalg.svd(whole, full_matrices=False))


def by_square(whole: np.ndarray) -> tuple[np.ndarray, ...]:
    """Exact to the root of FP64's epsilon: where nothing is zero that should not be."""
    squares, vectors = np.linalg.eigh(whole @ whole.T)
    sizes, vectors = np.sqrt(squares.clip(0))[::-1], vectors[:, ::-1]
    return vectors, sizes, (vectors.T @ whole) / sizes.clip(1e-300)[:, None]


@pytest.mark.parametrize("of", EXACT)
@pytest.mark.parametrize("algorithm", [by_numpy, by_square])
def test_any_library_and_algorithm_makes_the_same_bytes(of: str, algorithm: Any) -> None:
    """Of more directions than there are too: those beyond are zeros. numpy's LAPACK is not torch's."""
    whole = EXACT[of]
    rank = min(whole.shape)
    u, s, v = algorithm(whole.numpy())
    count = int((s > 1e-5 * s[0]).sum())
    expected = [np.zeros((len(u), rank)), np.zeros((rank, whole.shape[1]))]
    for n in range(count):
        large = np.abs(u[:, n])
        sign = np.sign(u[np.argmax(large > 0.9 * large.max()), n])
        expected[0][:, n], expected[1][n] = sign * s[n] * u[:, n], sign * v[n]
    q, r = torch.linalg.qr(whole)
    for parts in ([whole], [q, r]):
        factors = Factors("m", lambda parts=parts: parts, (len(u), whole.shape[1]), rank)  # type: ignore[misc]
        assert int((factors.values() > 0).sum()) == count
        for found, array in zip(factors.get(), expected, strict=True):
            assert torch.equal(found.half(), torch.from_numpy(array).half().flatten()), count


def test_clamped_at_a_quantile_of_both_factors() -> None:
    whole = matrix("linear")
    up, down = Factors("m", lambda: [whole], (8, 12), 2).get()
    values_ = torch.cat((up, down)).double()
    most = float(torch.quantile(values_, 0.99))
    clamped = torch.cat(tuple(Factors("m", lambda: [whole], (8, 12), 2, 0.99).get()))
    assert float(clamped.abs().max()) == pytest.approx(most, rel=1e-6)
    assert torch.allclose(clamped.double(), values_.clamp(-most, most), rtol=1e-6)


def test_zeros_decide_nothing_of_where_sizes_end() -> None:
    whole = noisy(40, 90, 2)
    three, thirty = (Factors("m", lambda: [whole], (40, 90), rank, 0.99).get() for rank in (2, 30))
    assert torch.equal(three[0].view(40, 2), thirty[0].view(40, 30)[:, :2])
    assert torch.equal(three[1], thirty[1][: 2 * 90]) and not thirty[1][2 * 90 :].any()


@pytest.mark.parametrize(
    ("cls", "plain", "all_", "example"),
    [
        ("UNET-v1", 192, 278, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"),
        ("UNET-v2", 192, 278, "lora_unet_up_blocks_1_attentions_2_proj_out"),
        ("UNET-XL", 722, 788, "lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_0_proj"),
        ("CLIP-v1", 72, 72, "lora_te_text_model_encoder_layers_11_mlp_fc2"),
        ("CLIP-v2", 138, 138, "lora_te_text_model_encoder_layers_22_self_attn_v_proj"),
        ("CLIP-XL-AUX", 72, 72, "lora_te1_text_model_encoder_layers_0_self_attn_out_proj"),
        ("CLIP-XL", 192, 192, "lora_te2_text_model_encoder_layers_31_self_attn_k_proj"),
    ],
)
def test_the_modules_that_trainers_train(cls: str, plain: int, all_: int, example: str) -> None:
    shipped = load_catalog(())
    adapters = shipped.traits[cls].adapters
    assert adapters is not None
    rules = shipped.rules[adapters.rules] if adapters.rules else None
    shapes: dict[str, LazyTensor] = {n: Shaped(r.shape) for n, r in shipped.classes[cls][0].tensors.items()}
    found = extracted(shapes, adapters, rules, convolutions=True)
    assert len(found) == all_ and example in found
    assert len(extracted(shapes, adapters, rules, convolutions=False)) == plain
    read = targets(shapes, adapters, rules)
    assert all(read[name]["weight"] == target for name, target in found.items())


# ── recipes ──

QUERY = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CONV = "input_blocks.1.0.in_layers.2.weight"
FC1 = "encoder.layers.0.mlp.fc1.weight"
QUERY_ = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV_ = "lora_unet_down_blocks_0_resnets_0_conv1"
FC1_ = "lora_te_text_model_encoder_layers_0_mlp_fc1"
MODELS = """\
format = 1
name = "x"
base = "ex"
sources.t.file = "tuned.safetensors"
sources.b.file = "base.safetensors"
"""
STEP = '[steps.ex]\nop = "extract-lora"\na = "t"\nbase = "b"\n'


def base() -> dict[str, LazyTensor]:
    return dict(model("SD-mini", seed=1))


def numbers(tensor: LazyTensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(tensor.tobytes()), dtype=tensor.dtype.torch).view(tensor.shape).double()


def change(name: str, shape: tuple[int, ...], rank: int, size: float) -> torch.Tensor:
    """What a tuned model adds to a weight: a matrix of low rank."""
    generator = torch.Generator().manual_seed(len(name))
    flat = (shape[0], int(torch.tensor(shape[1:]).prod()))
    left = torch.randn(flat[0], rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, flat[1], generator=generator, dtype=torch.float64)
    return (left @ right * size).view(shape)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two models that differ by a change of rank 2 in three weights."""
    made = Folder.below(tmp_path)
    tensors = base()
    save(made / "base.safetensors", tensors)
    for name in (UNET + QUERY, UNET + CONV, CLIP + FC1):
        tensor = tensors[name]
        moved = numbers(tensor) + change(name, tensor.shape, 2, 0.1)
        tensors[name] = values(moved.numpy())
    save(made / "tuned.safetensors", tensors)
    return made


def built(folder: Folder, text: str, *options: object) -> dict[str, torch.Tensor]:
    folder.write("x.toml", text)
    folder.build("x.toml", *options)
    kinds = {"F16": torch.float16, "F32": torch.float32}
    return {
        n: torch.frombuffer(bytearray(data), dtype=kinds[dtype]).view(shape).double()
        for n, (dtype, shape, data) in content(folder / "x.safetensors").items()
        if dtype in kinds
    }


def metadata(folder: Folder) -> Mapping[str, str]:
    with open_checkpoint(folder / "x.safetensors", catalog().layouts) as held:
        return held.metadata


def test_a_lora_as_an_output(folder: Folder) -> None:
    made = built(folder, MODELS + STEP + "rank = 3\nclamp = 1\n")
    assert len(made) == 3 * (192 + 72)
    assert {str(d[0]) for d in content(folder / "x.safetensors").values()} == {"F16"}
    up, down = made[f"{QUERY_}.lora_up.weight"], made[f"{QUERY_}.lora_down.weight"]
    assert (up.shape[1], down.shape[0], float(made[f"{QUERY_}.alpha"])) == (3, 3, 3.0)
    expected = change(UNET + QUERY, base()[UNET + QUERY].shape, 2, 0.1)
    assert (up @ down - expected).abs().max() < 2e-3 * expected.abs().max()
    said = metadata(folder)
    assert {k: v for k, v in said.items() if k.startswith("ss_")} == {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "3.0",
        "ss_network_args": "{}",
    }
    assert "ckpt.recipe" in said
    assert folder("verify", "x.toml").code == 0
    assert folder.states("x.toml")["output x.safetensors"] == "unchanged"


def test_baked_into_the_base_it_is_the_tuned_model(folder: Folder) -> None:
    step = STEP + 'rank = 2\nconv_rank = 2\nclamp = 1\n[steps.lo]\nop = "apply-lora"\na = "b"\n'
    text = MODELS.replace('"ex"', '"lo"') + step + 'loras = { ex = 1 }\n[output]\nprecision = "fp32"\n'
    made = built(folder, text)
    for name in (UNET + QUERY, UNET + CONV, CLIP + FC1):
        tensor = base()[name]
        expected = numbers(tensor) + change(name, tensor.shape, 2, 0.1)
        assert (made[name] - expected).abs().max() < 2e-6
    other = UNET + "out.2.weight"
    assert torch.equal(made[other], numbers(base()[other]))


def test_any_number_of_threads_gives_the_same_bytes(folder: Folder) -> None:
    for step in ("rank = 2\n", "ratio = 0.01\nconv_rank = 2\n"):
        for threads in (1, 8):
            built(folder, MODELS + STEP + step, "--threads", threads)
            now = (folder / "x.safetensors").read_bytes()
            (folder / "x.safetensors").unlink()
            if threads == 1:
                first = now
        assert now == first


def test_convolutions_have_a_rank_of_their_own(folder: Folder) -> None:
    made = built(folder, MODELS + STEP + "rank = 4\nconv_rank = 2\nclamp = 1\n")
    up, down = made[f"{CONV_}.lora_up.weight"], made[f"{CONV_}.lora_down.weight"]
    assert (up.shape[1:], down.shape[0], down.shape[2:]) == ((2, 1, 1), 2, (3, 3))
    expected = change(UNET + CONV, base()[UNET + CONV].shape, 2, 0.1)
    assert ((up.flatten(1) @ down.flatten(1)).view(expected.shape) - expected).abs().max() < 0.01
    said = json.loads(metadata(folder)["ss_network_args"])
    assert said == {"conv_dim": "2", "conv_alpha": "2.0"}
    # 1x1 convolutions have the rank of linear layers, in four dimensions.
    assert made["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape[0] == 4


def test_ranks_that_the_weights_decide(folder: Folder) -> None:
    """A change of rank 2 is found to be one; what is not worth a LoRA is stored as it is."""
    made = built(folder, MODELS + STEP + 'threshold = 0.05\ncomponents = ["UNET-mini"]\n')
    assert made[f"{QUERY_}.lora_down.weight"].shape[0] == 2
    assert made["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape[0] == 1
    said = metadata(folder)
    assert (said["ss_network_module"], said["ss_network_dim"]) == ("lycoris.kohya", "Dynamic")
    assert not [n for n in made if n.startswith("lora_te")]
    name = UNET + QUERY
    tensor = base()[name]
    full = numbers(tensor) + change(name, tensor.shape, 8, 0.1)
    save(folder / "tuned.safetensors", base() | {name: values(full.numpy())})
    made = built(folder, MODELS + STEP + "threshold = 0.05\n")
    assert torch.equal(made[f"{QUERY_}.diff"], (full.float() - numbers(tensor).float()).half().double())
    made = built(folder, MODELS + STEP + "threshold = 0.05\nrank = 2\n")
    assert made[f"{QUERY_}.lora_down.weight"].shape[0] == 2


def test_a_text_encoder_that_hardly_differs_is_left_out(folder: Folder) -> None:
    made = built(folder, MODELS + STEP + "rank = 1\nmin_difference = 100\n")
    assert made and not [n for n in made if n.startswith("lora_te")]
    said = folder("build", "x.toml").err
    assert "CLIP-mini is left out: no weight differs by more than 100" in said


def test_the_plan_says_that_its_tensors_follow_from_what_it_reads(folder: Folder) -> None:
    folder.write("x.toml", MODELS + STEP + "ratio = 0.5\n")
    said = folder("plan", "x.toml").out
    assert "its inputs are read when an output that needs it is begun" in said
    assert said.endswith(", writes unknown\n")


def test_where_v_is_predicted_the_file_says_so(folder: Folder) -> None:
    with open_checkpoint(folder / "tuned.safetensors", catalog().layouts) as held:
        tensors = {n: values(numbers(t).numpy()) for n, t in held.items() if t.dtype.floating}
    save(folder / "tuned.safetensors", tensors | {"v_pred": values([])})
    built(folder, MODELS + STEP + "rank = 1\ncomponents = ['CLIP-mini']\n")
    assert metadata(folder)["ss_base_model_version"] == "sd_v1_v"


def test_as_a_pytorch_file_it_is_a_plain_state_dict(folder: Folder) -> None:
    folder.write("x.toml", MODELS + STEP + "rank = 1\n[output]\nfile = 'x.pt'\n")
    folder.build("x.toml")
    held = torch.load(folder / "x.pt", weights_only=True)
    assert held[f"{QUERY_}.lora_down.weight"].dtype == torch.float16


def test_no_folder_of_a_lora(folder: Folder) -> None:
    folder.write("x.toml", MODELS + STEP + "rank = 1\n[output]\nfile = 'x/'\n")
    found = folder("plan", "x.toml")
    assert found.code == 3 and "no model that diffusers' layout is known for" in found.err


def test_stored_it_is_not_computed_again(folder: Folder) -> None:
    built(folder, MODELS + STEP + "rank = 2\nstore = true\n")
    first = (folder / "x.safetensors").read_bytes()
    (folder / "x.safetensors").unlink()
    made = folder.build("x.toml")
    assert (folder / "x.safetensors").read_bytes() == first
    assert made["made"] == ["checkpoint of ex"]  # rounded anew of what is stored


def test_a_lora_of_another_recipe(folder: Folder) -> None:
    built(folder, MODELS + STEP + "rank = 2\nclamp = 1\n")
    folder.write(
        "y.toml",
        'format = 1\nname = "y"\nbase = "lo"\nsources.l.recipe = "x.toml"\n'
        'sources.b.file = "base.safetensors"\n'
        '[steps.lo]\nop = "apply-lora"\na = "b"\nloras = { l = 1 }\n[output]\nprecision = "fp32"\n',
    )
    folder.build("y.toml")
    data = content(folder / "y.safetensors")[UNET + QUERY]
    made = torch.frombuffer(bytearray(data[2]), dtype=torch.float32).view(data[1]).double()
    tensor = base()[UNET + QUERY]
    expected = numbers(tensor) + change(UNET + QUERY, tensor.shape, 2, 0.1)
    assert (made - expected).abs().max() < 5e-3


# ── resized ──

RESIZE = """\
format = 1
name = "x"
base = "re"
[sources.l]
file = "l.safetensors"
[steps.re]
op = "resize-lora"
lora = "l"
"""


def lora(
    folder: Folder, ends: tuple[str, str] = ("lora_up.weight", "lora_down.weight"), **said: str
) -> torch.Tensor:
    """A file of a LoRA of rank 4, alpha 2, whose singular values are 8, 4, 2, 1; its product."""
    generator = torch.Generator().manual_seed(7)
    left = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(9, 4, generator=generator, dtype=torch.float64))[0].T
    up, down = left * torch.tensor([8.0, 4.0, 2.0, 1.0]).double(), right
    tensors = {f"m.{ends[0]}": values(up.float().numpy()), f"m.{ends[1]}": values(down.float().numpy())}
    tensors["n.diff"] = values([[1.0, 2.0]])
    if ends[0].startswith("lora_up"):
        tensors["m.alpha"] = values(2.0)
    theirs = {n: numbers(t).float() for n, t in tensors.items()}
    safetensors.torch.save_file(theirs, folder / "l.safetensors", said)
    return up.float().double() @ down.float().double()


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        ("rank = 2", 2),
        ("rank = 9", 4),  # no more than it has
        ("rank = 4\nsv_ratio = 3", 3),  # 8 and 4 are above 8/3, and one more
        ("rank = 2\nsv_ratio = 3", 2),
        ("rank = 4\nsv_cumulative = 0.75", 3),  # (8 + 4) / 15 is enough, and one more
        ("rank = 4\nsv_fro = 0.85", 2),  # 64 / 85 is more than 0.85², and one more
    ],
)
def test_a_lora_of_another_rank(folder: Folder, how: str, rank: int) -> None:
    whole = lora(folder, ss_network_dim="4", ss_network_alpha="2.0", ss_tag="kept", sshs_model_hash="gone")
    made = built(folder, RESIZE + how + '\n[output]\nprecision = "fp32"\n')
    up, down = made["m.lora_up.weight"], made["m.lora_down.weight"]
    assert (up.shape, down.shape, float(made["m.alpha"])) == ((6, rank), (rank, 9), rank / 2)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    assert (up @ down - (u[:, :rank] * s[:rank]) @ v[:rank]).abs().max() < 1e-5
    assert made["n.diff"].tolist() == [[1.0, 2.0]]
    said = metadata(folder)
    fixed = "sv_" not in how
    assert (said["ss_tag"], "sshs_model_hash" in said) == ("kept", False)
    asked = how.split("\n")[0].removeprefix("rank = ")
    assert said["ss_network_dim"] == (asked if fixed else "Dynamic")
    assert said["ss_network_alpha"] == (str(int(asked) / 2) if fixed else "Dynamic")
    assert f"from 4{f' to {asked}' if fixed else ''}; " in said["ss_training_comment"]


def test_what_a_lora_says_is_kept_where_it_is_fetched_first(folder: Folder, tmp_path: Path) -> None:
    lora(folder, ss_network_dim="4", ss_tag="kept")
    data = (folder / "l.safetensors").read_bytes()
    with hosts(tmp_path) as net:
        hugging_face(net.hub, net.storage, "org/l", "l.safetensors", data)
        source = f'urls = ["hf://org/l/l.safetensors"]\nsha256 = "{sha256(data)}"'
        net.folder.write("x.toml", RESIZE.replace('file = "l.safetensors"', source) + "rank = 2\n")
        net.folder.build("x.toml")
        assert metadata(net.folder)["ss_tag"] == "kept"


def test_what_peft_says_of_the_scale_is_kept(folder: Folder) -> None:
    """The scale is alpha over the root of the rank; an alpha of its own keeps it where the rank changes."""
    told = json.dumps({"r": 4, "lora_alpha": 6, "use_rslora": True})
    lora(folder, ("lora_B.weight", "lora_A.weight"), lora_adapter_metadata=told)
    made = built(folder, RESIZE + "rank = 2\n")
    assert float(made["m.alpha"]) / 2 == 6 / 2.0  # alpha / rank = 6 / √4
    assert "lora_adapter_metadata" not in metadata(folder)


def test_an_extracted_lora_resized(folder: Folder) -> None:
    text = MODELS.replace('"ex"', '"re"') + STEP + 'rank = 4\nclamp = 1\n[steps.re]\nop = "resize-lora"\n'
    made = built(folder, text + 'lora = "ex"\nrank = 2\n')
    expected = change(UNET + QUERY, base()[UNET + QUERY].shape, 2, 0.1)
    found = made[f"{QUERY_}.lora_up.weight"] @ made[f"{QUERY_}.lora_down.weight"]
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    said = metadata(folder)
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_base_model_version"]) == (
        "2",
        "2.0",
        "sd_v1",
    )


# ── what is wrong ──


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MODELS + STEP, "says nothing of how much is kept"),
        (MODELS + STEP + "ratio = 0.5\nquantile = 0.5\n", "`quantile` cannot go with `ratio`"),
        (MODELS + STEP + "rank = 2\n[output]\nunknown = 'keep'\n", "`unknown` cannot go with a LoRA"),
        (MODELS + STEP + "rank = 2\n[components]\nVAE-mini = 'b'\n", "`components` cannot go with a LoRA"),
        (
            MODELS.replace('"ex"', '"w"')
            + STEP
            + "rank = 2\n[steps.w]\nop = 'weighted-sum'\na = 'b'\nb = 'ex'\n",
            "`ex` is a LoRA, and no model",
        ),
        (
            MODELS.replace('"ex"', '"b"') + STEP + "rank = 2\n[components]\nUNET-mini = 'ex'\n",
            "`ex` is a LoRA, and no model",
        ),
        (
            MODELS.replace('"ex"', '"l"') + "[steps.w]\nop = 'weighted-sum'\na = 'b'\nb = 't'\n"
            "[steps.l]\nop = 'apply-lora'\na = 'b'\nloras = ['w']\n",
            "`w` is a model, and no LoRA",
        ),
    ],
)
def test_recipes_that_take_one_for_the_other(folder: Folder, text: str, said: str) -> None:
    folder.write("x.toml", text)
    found = folder("plan", "x.toml")
    assert found.code == 3 and said in found.err, found.err


def test_models_of_other_kinds(folder: Folder) -> None:
    tensors = base()
    odd = {UNET + QUERY: float("nan")}
    save(folder / "tuned.safetensors", tensors | {n: values([[v] * 8] * 8) for n, v in odd.items()})
    folder.write("x.toml", MODELS + STEP + "rank = 2\n")
    found = folder("build", "x.toml")
    assert found.code == 7 and f"what is extracted for `{QUERY_}` is not finite" in found.err
    save(folder / "tuned.safetensors", {"a.lora_up.weight": values([[1.0]])})
    found = folder("plan", "x.toml")
    assert found.code == 3 and "the step `ex` has nothing to work on" in found.err


@pytest.mark.parametrize("shapes", [((), ()), ((6, 4), (3, 9)), ((6, 0), (0, 9)), ((6, 4), (4,))])
@pytest.mark.parametrize("how", ["rank = 2\n", "rank = 2\nsv_fro = 0.5\n"])
def test_factors_that_are_none(folder: Folder, shapes: tuple[tuple[int, ...], ...], how: str) -> None:
    up, down = (values(torch.ones(shape).numpy()) for shape in shapes)
    save(folder / "l.safetensors", {"m.lora_up.weight": up, "m.lora_down.weight": down})
    folder.write("x.toml", RESIZE + how)
    found = folder("build", "x.toml")
    assert found.code == 6 and "the factors of `m` do not fit each other" in found.err


def test_a_file_without_a_lora(folder: Folder) -> None:
    save(folder / "l.safetensors", {"n.diff": values([[1.0, 2.0]])})
    folder.write("x.toml", RESIZE + "rank = 2\n")
    found = folder("build", "x.toml")
    assert found.code == 6 and "finds no LoRA" in found.err

"""The metric is the published one, to the digit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.generate import make
from builder.models.catalog import Scale, load_catalog
from builder.models.metric import Metric, counted, digits, label, measure, weigh
from builder.tensors.lazy import LazyTensor
from builder.tensors.scan import BINS
from tests.tensors.test_scan import held, histogram

CATALOG = load_catalog()
SCALES = CATALOG.scales
WEIGHTS = ("encoder.conv_in.weight", "decoder.conv_in.weight")
UNET, VAE, CLIP, CLIP2 = (SCALES[c] for c in ("UNET-v1", "VAE-v1", "CLIP-v1", "CLIP-v2"))


def defined(values: torch.Tensor) -> float:
    """The published definition, computed as it stands."""
    return float((torch.sigmoid(values.to(torch.float16).to(torch.float32)) - 0.5).sum())


@settings(max_examples=25)
@given(mean=st.floats(-0.01, 0.01), spread=st.floats(0.001, 1.0), seed=st.integers(0, 2**31))
def test_a_sum_is_the_definitions_own(mean: float, spread: float, seed: int) -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(seed)) * spread + mean
    exact = float((torch.sigmoid(values.half().float()) - 0.5).double().sum())
    assert weigh(histogram(values)) == pytest.approx(exact, abs=2e-4)


def test_the_most_sensitive_part_agrees_within_one() -> None:
    # CLIP is scaled by a million, so what float32 rounds away in a sigmoid shows in its last digits.
    # These are its real shapes, and numbers whose sum is near the real one.
    random = torch.Generator().manual_seed(7)
    clip, total = {}, 0.0
    for layer in range(12):
        for name, shape in (("fc1", (3072, 768)), ("fc2", (768, 3072))):
            weight = (torch.randn(shape, generator=random) * 0.02 - 1.483e-4).half()
            clip[f"encoder.layers.{layer}.mlp.{name}.weight"] = held(weight)
            total += defined(weight)
    assert abs(total / CLIP.base - 1) < 0.05
    found = int(measure({"CLIP-v1": clip}, CATALOG).clip)
    assert abs(found - int(digits(total, CLIP))) <= 1


def test_every_float16_is_weighed_as_torch_does() -> None:
    bits = np.arange(BINS, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.float16).copy())
    torchs = (torch.sigmoid(values.float()) - 0.5).double().numpy()
    ours = np.array([weigh(np.bincount([b], minlength=BINS)) for b in bits.tolist()[::17]])
    np.testing.assert_allclose(ours, torchs[::17], rtol=0, atol=1.3e-7)


@pytest.mark.parametrize(
    ("total", "scale", "expected"),
    [
        (UNET.base, UNET, "0000"),
        (UNET.base * 1.2020001, UNET, "2020"),
        (UNET.base * 0.7979999, UNET, "2020"),
        (VAE.base * 1.29825, VAE, "2982"),
        (CLIP.base * 1.0001305, CLIP, "0130"),
        (CLIP2.base * 1.11415, CLIP2, "1141"),
        (UNET.base * 1.99995, UNET, "9999"),
        (UNET.base * 2.00005, UNET, "5000"),
        (UNET.base * 2.49995, UNET, "9999"),
        (UNET.base * 2.50005, UNET, "5000"),
        (-UNET.base, UNET, "5000"),
        (UNET.base * 1000.12345, UNET, "6234"),
        (0.0, UNET, "----"),
        (math.nan, UNET, "NaN!"),
    ],
)
def test_digits(total: float, scale: Scale, expected: str) -> None:
    assert digits(total, scale) == expected


@given(st.floats(-1e5, 1e5).filter(bool))
def test_digits_wrap_by_subtraction(total: float) -> None:
    n = int(abs(total / VAE.base - 1) * VAE.k)
    while n >= 10000:
        n -= 5000
    assert digits(total, VAE) == f"{n:04d}"


def test_which_tensors_count() -> None:
    names = {
        "UNET-v1": ["input_blocks.0.0.weight"],
        "VAE-v1": ["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"],
        "CLIP-v1": ["encoder.layers.0.mlp.fc1.weight", "embeddings.position_ids"],
        "CLIP-v2": ["transformer.resblocks.22.mlp.c_fc.bias", "transformer.resblocks.23.mlp.c_fc.bias"],
        "UNET-XL": ["input_blocks.0.0.weight"],
        "EMA-UNET-v1": ["input_blocks00weight"],
    }
    components = {cls: {n: f"full.{n}" for n in bare} for cls, bare in names.items()}
    assert counted(components, CATALOG) == {
        "full.input_blocks.0.0.weight": "UNET-v1",
        "full.encoder.conv_in.weight": "VAE-v1",
        "full.decoder.conv_in.weight": "VAE-v1",
        "full.encoder.layers.0.mlp.fc1.weight": "CLIP-v1",
        "full.transformer.resblocks.22.mlp.c_fc.bias": "CLIP-v2",
    }


def test_the_label() -> None:
    counts = np.zeros(BINS, np.int64)
    assert label({}, SCALES).text == "----/----/----"
    assert label({"UNET-v1": counts}, SCALES).text == "----/----/----"  # all of nothing
    counts[0x7E00] = 1
    assert label({"VAE-v1": counts}, SCALES) == Metric(vae="NaN!")
    counts[0x7E00], counts[0x7C00], counts[0xFC00] = 0, 5, 2
    assert weigh(counts) == 1.5  # infinity is at the end of a sigmoid, as in the definition


def test_of_two_text_encoders_the_first_counts() -> None:
    """So a checkpoint's own is not drowned by one of another family that lies beside it."""
    one, two = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    one[0x3C00], two[0x4000] = 4000, 9000
    ours, theirs = label({"CLIP-v1": one}, SCALES).clip, label({"CLIP-v2": two}, SCALES).clip
    assert ours != theirs
    assert label({"CLIP-v1": one, "CLIP-v2": two}, SCALES).clip == ours
    assert label({"CLIP-v2": two, "CLIP-v1": one}, SCALES).clip == theirs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_measuring_any_precision(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(2)
    values = {n: (torch.randn(5000, generator=random) - 0.1).to(dtype) for n in WEIGHTS}
    vae: dict[str, LazyTensor] = {n: held(v) for n, v in values.items()}
    total = sum(defined(v) for v in values.values())
    assert abs(int(measure({"VAE-v1": vae}, CATALOG).vae) - int(digits(total, VAE))) <= 1


def test_threads_and_order_change_no_bit() -> None:
    random = torch.Generator().manual_seed(3)
    names = CATALOG.classes["UNET-v1"][0].tensors
    unet: dict[str, LazyTensor] = {n: held(torch.randn(30_000, generator=random)) for n in list(names)[:30]}
    backwards = dict(reversed(unet.items()))
    found = {measure({"UNET-v1": u}, CATALOG, threads=t) for u in (unet, backwards) for t in (1, 2, 5)}
    assert len(found) == 1 and found.pop().unet.isdigit()


def test_the_miniature_family_has_a_metric_of_its_own() -> None:
    labels = set()
    for seed in (0, 1):
        parts = {cls: make(cls, seed=seed).tensors for cls in ("UNET-mini", "VAE-mini", "CLIP-mini")}
        found = measure(parts, CATALOG)
        assert all(part.isdigit() for part in (found.unet, found.vae, found.clip))
        labels.add(found)
    assert len(labels) == 2

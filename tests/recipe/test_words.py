"""The words for components are those of the command line: kinds where the architecture makes them clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.base.errors import RecipeError
from builder.recipe import Recipe, parse_recipe
from tests.help.building import Folder, catalog, content

SOURCES = 'format = 1\nname = "x"\nsources.a.file = "a.safetensors"\n'


def read(base: str, *lines: str) -> Recipe:
    return parse_recipe("\n".join([f'{SOURCES}base = "{base}"', *lines]), "x.toml", catalog())


def refused(base: str, *lines: str) -> list[tuple[str, str | None]]:
    with pytest.raises(RecipeError) as raised:
        read(base, *lines)
    return [(p.fact, p.hint) for p in raised.value.problems]


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("SDv1", {"VAE": "VAE-v1", "CLIP": "CLIP-v1", "UNET": "UNET-v1", "EMA": "EMA-UNET-v1"}),
        ("SD-XL", {"vae": "VAE-v1", "UNET": "UNET-XL", "CLIP-XL": "CLIP-XL", "clip xl aux": "CLIP-XL-AUX"}),
        ("SD-mini", {"Vae": "VAE-mini", "clip": "CLIP-mini", "unet": "UNET-mini"}),
        (
            "SDv3",
            {
                "MMDIT": "MMDIT-v3",
                "VAE": "VAE-v3",
                "CLIP-L-v3": "CLIP-L-v3",
                "CLIP-G-v3": "CLIP-G-v3",
                "T5": "T5-XXL",
            },
        ),
    ],
)
def test_a_kind_is_the_class_of_the_architecture(architecture: str, words: dict[str, str]) -> None:
    said = read(f"NEW {architecture}", *(f'components."{word}" = "a"' for word in words))
    assert {c: p.cls for c, p in said.outputs[0].components.items()} == {c: c for c in words.values()}
    spelt = read(f"NEW {architecture}", *(f'components.{cls} = "a"' for cls in words.values()))
    assert said.digest == spelt.digest


def test_what_a_kind_does_not_make_clear_is_told() -> None:
    facts = refused("NEW SD-XL", *(f'components.{word} = "a"' for word in ("UNET", "VAE", "CLIP")))
    assert facts == [("`CLIP` may be `CLIP-XL` or `CLIP-XL-AUX`", "name the one you mean")]


def test_a_slot_by_two_words_is_filled_twice() -> None:
    words = ("UNET", "CLIP", "VAE", "VAE-v1")
    facts = refused("NEW SDv1", *(f'components.{word} = "a"' for word in words))
    assert facts == [("`VAE-v1` is filled twice", "remove it, or `VAE`")]


@pytest.mark.parametrize(
    ("base", "word", "fact", "hint"),
    [
        ("NEW SDv1", "T5", "`SD-v1` has no slot `T5`", "its slots: `UNET-v1`, `VAE-v1`, `CLIP-v1`"),
        ("NEW SDv1", "VEA-v1", "unknown class `VEA-v1`", "did you mean `VAE-v1`?"),
        ("NEW SD-XL", "UNTE-v1", "unknown class `UNTE-v1`", "did you mean `UNET-XL`?"),
        ("NEW SDv3", "VAE-v9", "unknown class `VAE-v9`", "did you mean `VAE-v3`?"),
        ("NEW SD-mini", "UNET-v11", "unknown class `UNET-v11`", "did you mean `UNET-mini`?"),
        ("a", "UNTE-v1", "unknown class `UNTE-v1`", "did you mean `UNET`?"),
        ("a", "VAE-v9", "unknown class `VAE-v9`", "did you mean `VAE`?"),
    ],
)
def test_hints_name_no_class_of_another_architecture(base: str, word: str, fact: str, hint: str) -> None:
    assert (fact, hint) in refused(base, f'components.{word} = "a"')


def test_weights_by_a_wrong_class_hint_at_its_kind() -> None:
    step = 's = { op = "weighted-sum", a = "a", b = "a", alpha = { UNTE-v9 = 1 } }'
    assert ("unknown block or class `UNTE-v9`", "did you mean `UNET`?") in refused("s", f"steps.{step}")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.below(tmp_path).mini()


def build(folder: Folder, name: str, *lines: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    sources = ('sources.dirty.file = "dirty.ckpt"', 'sources.vae.file = "vae.safetensors"')
    folder.write(f"{name}.toml", "\n".join(["format = 1", f'name = "{name}"', *sources, *lines]))
    folder.build(f"{name}.toml")
    return content(folder / f"{name}.safetensors")


def test_a_base_that_is_a_file_makes_them_clear(folder: Folder) -> None:
    """Also the average of a class, and that of an included recipe."""
    words = build(
        folder,
        "a",
        'base = "dirty"',
        'components.VAE = "vae"',
        'components.UNET = { from = "dirty", component = "EMA" }',
    )
    named = build(
        folder,
        "b",
        'base = "dirty"',
        'components.VAE-mini = "vae"',
        'components.UNET-mini = { from = "dirty", component = "UNET-mini-EMA" }',
    )
    assert words == named
    outer = build(
        folder,
        "c",
        'base = "inner"',
        'sources.inner.recipe = "a.toml"',
        'components.CLIP = "dirty"',
        'output.unknown = "keep"',
        'components.VAE = "vae"',
    )
    assert outer == {n: t for n, t in named.items() if n in outer} and len(outer) > 1000


def test_steps_change_the_kinds_they_name(folder: Folder) -> None:
    step = 'steps.s = { op = "weighted-sum", a = "dirty", b = "dirty2", alpha = 0.5, components = ["%s"] }'
    from tests.help.building import model, save

    save(folder / "dirty2.safetensors", model("SD-mini", seed=7))
    more = ('base = "s"', 'sources.dirty2.file = "dirty2.safetensors"', 'components.VAE = "vae"')
    assert build(folder, "a", *more, step % "CLIP") == build(folder, "b", *more, step % "CLIP-mini")


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ('components.T5 = "vae"', "`SD-mini` has no slot `T5`"),
        ('components.UNET = { from = "vae", component = "EMA" }', "`vae` has no average of `UNET-mini`"),
    ],
)
def test_a_file_that_does_not_make_them_clear_is_told(folder: Folder, line: str, fact: str) -> None:
    folder.write(
        "x.toml",
        'format = 1\nname = "x"\nbase = "dirty"\nsources.dirty.file = "dirty.ckpt"\n'
        f'sources.vae.file = "vae.safetensors"\n{line}\n',
    )
    said = folder("build", "x.toml")
    assert said.code == 3 and said.err.startswith(f"error: {fact}\n")


def test_the_command_line_says_when_a_kind_is_unclear(folder: Folder) -> None:
    said = folder("replace", "NEW SD-XL", "CLIP=vae.safetensors", "-o", "x.safetensors")
    assert said.code == 2 and "error: `CLIP` may be `CLIP-XL` or `CLIP-XL-AUX`" in said.err

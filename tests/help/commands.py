"""Every command that click knows, and a line for each that it carries out, and one that it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import click
import numpy as np

from builder.cli import cli
from tests.help.building import CLIP, Folder, model, save, values


class Way(NamedTuple):
    """Words that a command carries out, and words that it refuses, with the exit code of that."""

    good: str
    bad: str
    code: int


FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"

# In a folder as `prepared` makes it, `work`.
WAYS: dict[str, Way] = {
    "build": Way("tiny.toml --check", "wrong.toml", 3),
    "components": Way("", "--full", 2),
    "components learn": Way("vae.safetensors --name mine", "vae.safetensors --prefix nothing.", 2),
    "components list": Way("", "tiny", 2),
    "components show": Way("UNET-tiny-SD", "UNET-tinny", 2),
    "convert": Way("dirty.ckpt -o converted.safetensors", "dirty.ckpt -o dirty.zip", 2),
    "demo": Way("demo", "dirty.ckpt", 2),
    "diff": Way("dirty.ckpt dirty.ckpt", "dirty.ckpt vae.safetensors", 1),
    "extract": Way("dirty.ckpt VAE -o out.vae.safetensors", "dirty.ckpt CLIP-v1", 2),
    "help": Way("store gc", "store gone", 2),
    "hook": Way("schema tiny.toml", "schema wrong.toml", 3),
    "inspect": Way("vae.safetensors", "none.safetensors", 6),
    "lock": Way("tiny.toml", "absent.toml", 5),
    "lora": Way(
        "mini.safetensors lora.safetensors=0.5 -o baked.safetensors", "mini.safetensors x -o y.ckpt", 6
    ),
    "merge": Way(
        "clean.safetensors dirty.ckpt --alpha 0.5 -o merged.safetensors", "vae.safetensors -o y.ckpt", 2
    ),
    "new": Way("clean.safetensors", "tiny.toml", 6),
    "plan": Way("tiny.toml", "tiny.toml --lock none --no-lock", 2),
    "prune": Way("dirty.ckpt -o pruned.safetensors", "broken.safetensors", 6),
    "replace": Way(
        "dirty.ckpt VAE=vae.safetensors -o replaced.safetensors",
        "dirty.ckpt VEA=vae.safetensors -o x.ckpt",
        2,
    ),
    "schema": Way("", "more", 2),
    "share": Way("tiny.toml --offline -o page", "wrong.toml", 3),
    "sweep": Way("tiny.toml output.precision=fp16,fp32", "tiny.toml steps.half.alpha=1", 2),
    "store check": Way("", "more", 2),
    "store gc": Way("--max-size 1MB", "--max-size much", 2),
    "store list": Way("", "more", 2),
    "store path": Way("", "more", 2),
    "ui": Way("", "--port 70000", 2),
    "verify": Way("tiny.toml", "tiny.toml vae.safetensors", 7),
}

ENDING = [name for name in WAYS if name != "ui"]  # by themselves


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its words, but groups that do nothing themselves."""
    yield from _below(cli, click.Context(cli, info_name="ckpt"), ())


def _below(
    command: click.Command, at: click.Context, words: tuple[str, ...]
) -> Iterator[tuple[str, click.Command]]:
    if words and (not isinstance(command, click.Group) or command.invoke_without_command):
        yield " ".join(words), command
    if isinstance(command, click.Group):
        for name in command.list_commands(at):
            inner = command.get_command(at, name)
            assert inner is not None
            yield from _below(inner, click.Context(inner, parent=at, info_name=name), (*words, name))


def prepared(folder: Folder) -> Folder:
    """A folder with all that the lines name."""
    folder.tiny()
    save(folder / "clean.safetensors", model("SD-tiny", seed=3))
    (folder / "broken.safetensors").write_bytes(b"no checkpoint")
    folder.write(
        "wrong.toml", 'format = 1\nname = "w"\nbase = "dirty"\nfixs = []\nsources.dirty.file = "dirty.ckpt"\n'
    )
    folder.write("absent.toml", 'format = 1\nname = "a"\nbase = "x"\nsources.x.file = "nowhere.ckpt"\n')
    mini = model("SD-mini", seed=3)
    save(folder / "mini.safetensors", mini)
    rows, wide = mini[CLIP + "encoder.layers.0.mlp.fc1.weight"].shape
    parts = {"up": np.ones((rows, 1)), "down": np.ones((1, wide))}
    save(folder / "lora.safetensors", {f"{FC1}.lora_{n}.weight": values(part) for n, part in parts.items()})
    said = folder("build", "tiny.toml")
    assert said.code == 0, said.err
    return folder

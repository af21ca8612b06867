"""`ckpt lora`: LoRAs baked into a model, in one line."""

from __future__ import annotations

from typing import Any

import click

from builder.cli.command import Command
from builder.cli.merge import OPTIONS, make
from builder.cli.options import PLACE, making, save_option


@click.command("lora", cls=Command)
@click.argument("model", metavar="FILE")
@click.argument("loras", nargs=-1, required=True, metavar="LORA[=STRENGTH]…")
@click.option("--ignore-unmatched", is_flag=True, help="Leave out what of a LoRA fits nothing in the model.")
@click.option("-o", "--output", type=PLACE, required=True, help="The file to write, or its folder.")
@making
@save_option
def command(model: str, loras: tuple[str, ...], ignore_unmatched: bool, **options: Any) -> int:
    """Write FILE with LoRAs baked in, each by its STRENGTH (default 1).

    \b
    ckpt lora model.safetensors style.safetensors=0.8 -o styled.safetensors
    ckpt lora model.safetensors a.safetensors=UNET=0.5,CLIP=0 b.safetensors -o both.safetensors
    """
    params = {"unmatched": "ignore"} if ignore_unmatched else {}
    words = {**OPTIONS, 'unmatched = "ignore"': "--ignore-unmatched"}
    return make((model, *loras), "apply-lora", params, words=words, **options)

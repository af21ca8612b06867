"""How Civitai calls what the catalog knows: base models and types of models."""

from __future__ import annotations

# By the model that a file is known to come from, else by its architecture.
_BASES = {
    "SD-v1": "SD 1.5",
    "SD-v1-Pix2Pix": "SD 1.5",
    "SD-v2": "SD 2.1",
    "SD-XL": "SDXL 1.0",
    "SD-XL-Pix2Pix": "SDXL 1.0",
    "Pony": "Pony",
    "Illustrious": "Illustrious",
    "NoobAI": "NoobAI",
    "Playground 2.5": "Playground v2",
    "SD-v3": "SD 3",
    "SD-v35-Large": "SD 3.5 Large",
    "SD v3.5 Large Turbo": "SD 3.5 Large Turbo",
    "SD-v35-Medium": "SD 3.5 Medium",
    "SVD": "SVD",
    "FLUX.1 schnell": "Flux.1 S",
    "FLUX.1 dev": "Flux.1 D",
    "FLUX.1 Kontext dev": "Flux.1 Kontext",
    "FLUX.1 Krea dev": "Flux.1 Krea",
    "FLUX": "Flux.1 D",
    "FLUX.2 dev": "Flux.2 D",
    "Chroma": "Chroma",
    "Lumina-2": "Lumina",
    "Qwen-Image": "Qwen",
}
_TYPES = {
    "checkpoint": "Checkpoint",
    "UNET": "Checkpoint",
    "DIT": "Checkpoint",
    "MMDIT": "Checkpoint",
    "VAE": "VAE",
    "LoRA": "LORA",
    "ControlNet": "Controlnet",
    "T2IAdapter": "Controlnet",
    "embedding": "TextualInversion",
    "hypernetwork": "Hypernetwork",
    "upscaler": "Upscaler",
    "AnimateDiff": "MotionModule",
}


def civitai_base(architecture: str | None, model: str | None) -> str | None:
    """The base model of a file, by its architecture and the model that it comes from; None: not known."""
    return _BASES.get(model or "") or _BASES.get(architecture or "")


def civitai_type(kind: str | None) -> str | None:
    """The type of what is of some kind, by the catalog's word for that; None where it has none of its own."""
    return _TYPES.get(kind or "")

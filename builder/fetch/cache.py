"""Where tools of Hugging Face keep what they download."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def hugging_face_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of Hugging Face's downloads: `HF_HUB_CACHE`, else `HF_HOME`, else by habit."""
    if given := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given).expanduser()
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home).expanduser() / "hub"

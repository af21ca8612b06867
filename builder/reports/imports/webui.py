"""A1111's and Forge's merger: every value of its formula is in the metadata."""

from __future__ import annotations

from builder.reports.imports.sketch import text_of
from builder.reports.imports.told import Drawn, Told


def draw(told: Told) -> Drawn:
    """What `webui` says. It merged the VAE too, and computed in the files' own type."""
    said, sketch = told.said, told.sketch
    sketch.rounds = True
    method, bakes = text_of(said, "interp_method"), text_of(said, "bake_in_vae") not in ("", "None")
    made = told.model("primary_model_hash", "a")
    plain = {"VAE": None if bakes else True, "arithmetic": "file"}
    if method in ("Weighted sum", "Add difference"):
        alpha = sketch.weight(said.get("multiplier"), f"the multiplier of `{told.name}`", 0.3)
        b = told.model("secondary_model_hash", "b")
        if method == "Weighted sum":
            made = told.step("weighted-sum", a=made, b=b, alpha=alpha, **plain)
        else:
            c = told.model("tertiary_model_hash", "c")
            made = told.step("add-difference", a=made, b=b, c=c, alpha=alpha, **plain)
    elif method != "No interpolation":
        made = sketch.instead(f"`{method or 'no method'}` of `{told.name}`", made)
    made = told.bake(made, said.get("bake_in_vae"))
    if discarded := text_of(said, "discard_weights"):
        sketch.miss(f"`discard_weights`: tensors like `{discarded}` were left out of `{told.name}`")
    return Drawn(made, "fp16" if said.get("save_as_half") is True else "keep")

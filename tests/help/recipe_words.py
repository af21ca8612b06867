"""What the tests of recipes share: operations to name, and the golden files."""

from __future__ import annotations

import os
from pathlib import Path

from builder.operations.registry import Applied, Operation, Param

GOLDEN = Path(__file__).parents[1] / "recipe" / "golden"

OPERATIONS = {
    o.name: o
    for o in (
        Operation(
            "weighted-sum",
            1,
            "A·(1−alpha) + B·alpha.",
            ("a", "b"),
            lambda inputs, params, setting: Applied(inputs["a"]),
            params={"alpha": Param("weights", "Share of B.", minimum=0, maximum=1)},
        ),
        Operation(
            "add-difference",
            1,
            "A + (B − C)·alpha.",
            ("a", "b"),
            lambda inputs, params, setting: Applied(inputs["a"]),
            optional_inputs=("c",),
            params={
                "alpha": Param("number", "Strength.", default=1.0),
                "mode": Param("choice", "How.", default="plain", choices=("plain", "smooth")),
                "times": Param("integer", "How often.", default=1, minimum=1),
            },
        ),
    )
}


def golden(path: Path, text: str) -> str:
    """What a golden file says; with UPDATE_GOLDEN in the environment it says `text` from now on."""
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8")

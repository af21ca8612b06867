"""Merges as mergekit's command for files of tensors does them, run by the interpreter that has it."""

import sys
from pathlib import Path


def main(output: str, share: str, *sources: str) -> None:
    """The weighted sum of models, each with `share` and all before it with the rest, as one linear merge."""
    from mergekit.scripts.merge_raw_pytorch import main as merge

    last, few = len(sources) - 1, float(share)
    shares = [(few if n else 1.0) * (1.0 - few) ** (last - n) for n in range(len(sources))]
    lines = ["merge_method: linear", "parameters: { normalize: false }", "dtype: float32"]
    lines += ["out_dtype: float16", "models:"]
    for path, weight in zip(sources, shares, strict=True):
        lines.append(f"  - {{ model: {path}, parameters: {{ weight: {weight!r} }} }}")
    config = Path(output).with_suffix(".yaml")
    config.write_text("\n".join(lines) + "\n")
    words = [str(config), str(Path(output).with_suffix("")), "--no-write-model-card"]
    merge(args=words, standalone_mode=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Merges as sd-mecha does them, run by the interpreter that has it: one weighted sum after the other."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import sd_mecha

    output, share, first, *others = sys.argv[1:]
    merged = sd_mecha.model(first)
    for path in others:
        merged = sd_mecha.weighted_sum(merged, sd_mecha.model(path), alpha=float(share))
    sd_mecha.merge(merged, output=output)

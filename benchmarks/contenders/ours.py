"""What has no command of its own: the reading of every tensor through the mapping."""

from __future__ import annotations

import sys

from builder.formats import open_checkpoint


def main() -> None:
    """Read every tensor of a checkpoint, window by window."""
    with open_checkpoint(sys.argv[1]) as checkpoint:
        for tensor in checkpoint.values():
            for _ in tensor.windows():
                pass


if __name__ == "__main__":
    main()

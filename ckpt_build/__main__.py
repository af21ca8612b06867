"""`ckpt`, and `python -m ckpt_build`: the command line."""

from builder.__main__ import main

__all__ = ["main"]

if __name__ == "__main__":
    main()

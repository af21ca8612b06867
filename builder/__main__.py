"""`python -m builder` is `ckpt`."""

from builder.cli import main

main()

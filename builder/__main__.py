"""`ckpt`, and `python -m builder`: loading it can be interrupted as cleanly as its work."""

from __future__ import annotations

import sys

try:
    from builder.base.signals import WORDS, catch, code_of
except KeyboardInterrupt:
    print("error: interrupted", file=sys.stderr)
    sys.exit(130)


def main() -> None:
    """Run the command line."""
    try:
        catch()
        from builder.cli import main as run

        run()
    except KeyboardInterrupt as error:
        code = code_of(error)
        print(f"error: {WORDS[code]}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()

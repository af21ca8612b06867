"""`python -m benchmarks`: run benchmarks and print their tables."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.entries import BENCHMARKS, FAMILIES, Bench
from benchmarks.harness import Report, run, to_json, to_markdown


def main() -> int:
    """The command line; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    add("--size", choices=list(FAMILIES), default="full", help="7.7 GB, or a few MB to try the benchmarks")
    add("--runs", type=int, default=5, help="rounds; every contender runs once a round")
    add("--cold", action="store_true", help="drop inputs from the page cache before each run")
    add("--json", action="store_true", dest="as_json", help="one JSON object instead of tables")
    add("--data", type=Path, help="folder for the files, about 30 GB; default: a temporary one")
    add("--keep", action="store_true", help="leave the files in --data for the next time")
    args = parser.parse_args()
    if unknown := set(args.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    with ExitStack() as stack:
        if args.data is not None:
            args.data.mkdir(parents=True, exist_ok=True)
        if args.data is not None and args.keep:
            folder = args.data
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=args.data)))
        bench = Bench(folder.resolve(), args.size)
        names = args.names or list(BENCHMARKS)
        results = [run(n, BENCHMARKS[n](bench), args.runs, warm=not args.cold) for n in names]
    if args.size == "small":  # where starting is all that counts, so the targets say nothing
        results = [replace(r, outcomes=()) for r in results]
    report = Report(results, args.runs, args.size, warm=not args.cold)
    print(json.dumps(to_json(report), indent=2) if args.as_json else to_markdown(report))
    return 0 if all(o.met for r in results for o in r.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

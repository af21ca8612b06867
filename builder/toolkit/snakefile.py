"""A plan as a workflow of Snakemake, for clusters that are spoken to by files and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from builder.base.errors import printable
from builder.build.spread import tasks_of
from builder.plan import Plan
from builder.sources.job import SourceJob
from builder.sources.opened import Sources

MARKS = "ckpt-tasks"  # the folder of the marks, below the one that Snakemake runs in
KEY = 16  # digits of a key that name its task

_HEAD = f"""\
# What `ckpt build` would do, a rule for each component and output that is worth a task of its own; made by
# `ckpt plan --snakemake`. All see the same files, and share a store: `CKPT_STORE` on a common file system,
# or the one that `--store` names. What a rule gives is a mark in `{MARKS}/`, and not the file itself, which
# Snakemake would remove before the rule runs and where it fails.
"""


def to_snakefile(
    plan: Plan, sources: Sources, recipe: Path, *, shared: str | None = None, options: Sequence[str] = ()
) -> str:
    """The text of a Snakefile that builds what a plan has to be made.

    `recipe` is the recipe's file. `shared` is the store that the tasks share, if not each machine's own is;
    `options` are further ones of every command.
    """
    outputs = [n.key for n in plan.outputs() if n.state != "unchanged"]
    tasks = tasks_of(plan, outputs) if outputs else {}
    store = ["--store", shared] if shared else []
    build = ["ckpt", "build", str(recipe.absolute()), *options, *store]
    name = re.sub(r"[^\w.-]+", "-", plan.recipe.name)
    rules = [
        _rule("all", [f"{MARKS}/{name}.done"]),
        _rule("finish", [_mark(k) for k in outputs], f"{MARKS}/{name}.done", build),
    ]
    for key, before in tasks.items():
        files = list(_files(plan, sources, key))
        inputs = [str(recipe.absolute()), *files, *(_mark(k) for k in before)]
        only = [*build, *["--store-write"] * bool(shared), "--only", key[:KEY]]
        label = printable(plan.nodes[key].label)
        rules.append(_rule(f"task_{key[:KEY]}", inputs, _mark(key), only, label))
    return "\n\n".join([_HEAD, *rules])


def _mark(key: str) -> str:
    return f"{MARKS}/{key[:KEY]}"


def _files(plan: Plan, sources: Sources, key: str) -> Iterator[str]:
    """The files of this machine that a task may read."""
    for k in sorted(plan.ancestors(key)):
        source = plan.nodes[k].job
        if isinstance(source, SourceJob) and (found := sources.find(source)) is not None:
            yield str(found.path.absolute())


def _rule(
    name: str, inputs: Sequence[str], mark: str = "", command: Sequence[str] = (), label: str = ""
) -> str:
    lines = [f"rule {name}:{f'  # {label}' * bool(label)}", "    input:"]
    # Braces are wildcards there, and cannot be escaped: such a file is not watched for changes.
    lines += [f"        {i!r}," for i in dict.fromkeys(inputs) if not {"{", "}"} & set(i)]
    if mark:
        lines += ["    output:", f"        touch({mark!r}),"]
        said = " ".join(map(shlex.quote, command)).replace("{", "{{").replace("}", "}}")
        threads = " --threads {threads}" if label else ""
        lines += ["    threads: 2"] * bool(label) + ["    shell:", f"        {said + threads!r}"]
    return "\n".join(lines)

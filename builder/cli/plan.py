"""`ckpt plan`: what a build would do, and why."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from builder.base.errors import ExitCode, Problem, UsageError
from builder.build.many import plan_recipes, read_recipes
from builder.cli.command import Command
from builder.cli.forms import Case
from builder.cli.options import (
    format_option,
    json_option,
    lock_place,
    locking,
    open_workspace,
    outside_option,
    quiet_option,
    recipes_argument,
)
from builder.cli.several import are_several, as_given, local, one_only, told
from builder.cli.terminal import out
from builder.plan import explain, joined
from builder.toolkit.snakefile import to_snakefile
from builder.workspace import find_lock


@click.command("plan", cls=Command)
@recipes_argument
@click.option("--dot", "form", flag_value="dot", help="A drawing for Graphviz.")
@click.option("--mermaid", "form", flag_value="mermaid", help="A drawing for Markdown.")
@click.option("--snakemake", "form", flag_value="snakemake", help="A Snakefile that builds it on a cluster.")
@click.option("--offline", is_flag=True, help="Use no network.")
@click.option("--store", "shared", metavar="URL", help="A store that machines share.")
@locking
@outside_option
@format_option
@json_option
@quiet_option
def command(
    recipes: tuple[Path | str, ...],
    form: str | None,
    offline: bool,
    shared: str | None,
    lock: Path | None,
    no_lock: bool,
    outside: bool,
    quiet: bool,
) -> int:
    """Say what building RECIPE would do: each step, its inputs, and why it is made or not.

    Of several recipes, or all in a folder and below it, one plan: a step that they share is one.
    Reads tables of contents only, never tensor data; downloads nothing.
    """
    said = out()
    if said.as_json and form is not None:
        raise UsageError(Problem(f"`--json` and `--{form}` exclude each other"))
    with (
        open_workspace(quiet, offline=offline, outside=outside, shared=shared) as workspace,
        workspace.sources() as sources,
        ExitStack() as context,
    ):
        several = are_several(recipes)
        if form == "snakemake":
            if several:
                fact = "`--snakemake` is for one recipe"
                raise UsageError(Problem(fact, hint="each recipe has a Snakefile of its own"))
            # Its commands run in other folders, and other keys follow from other paths.
            here = local(recipes[0], "`--snakemake`")
            context.enter_context(as_given([here]))
            lock = lock.absolute() if lock is not None else None
        where = lock_place(lock, no_lock)
        if several:
            one_only(recipes, lock=lock)
            outcomes = read_recipes(workspace, recipes, where)
            plans = plan_recipes(workspace, outcomes, sources)
            told(outcomes)
            plan = joined(plans)
        else:
            read = workspace.recipe(recipes[0], where)
            read = read.absolute() if form == "snakemake" else read
            plan = workspace.plan(read, sources, find_lock(read))
            said.cases.append(Case(str(recipes[0])))
        if form == "snakemake":
            repeated = {"--offline": offline, "--no-lock": no_lock, "--allow-outside": outside}
            options = [option for option, is_given in repeated.items() if is_given]
            options += ["--lock", str(lock)] if lock is not None else []
            shared = workspace.settings.shared or None
            drawn = to_snakefile(plan, sources, here, shared=shared, options=options)
        elif form is not None:
            drawn = explain.to_dot(plan) if form == "dot" else explain.to_mermaid(plan)
    if form is None:
        asked = [p.recipe for p in plans] if several else []
        said.result(explain.to_json(plan, asked), explain.to_text(plan))
    else:
        said.raw({}, drawn)
    return ExitCode.DONE

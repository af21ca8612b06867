"""`ckpt build`: from a recipe to its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from builder.base.dsse import PrivateKey
from builder.base.errors import ExitCode, Problem, UsageError, printable
from builder.base.progress import Reporter
from builder.build import build_recipe
from builder.build.carry_out import Elsewhere
from builder.build.many import Outcome, Several, read_recipes
from builder.build.recipes import build_node
from builder.build.spread import means_of
from builder.build.statements import Statements
from builder.cli.command import Command
from builder.cli.forms import Case
from builder.cli.options import (
    FILE,
    NAME,
    format_option,
    json_option,
    lock_place,
    locking,
    open_workspace,
    outside_option,
    quiet_option,
    recipes_argument,
    sharing,
)
from builder.cli.several import are_several, as_given, local, one_only, told
from builder.cli.terminal import out
from builder.plan import Plan, explain, joined
from builder.recipe import Recipe
from builder.recipe.names import whole_name
from builder.sources.opened import Sources
from builder.toolkit.command_recipe import place_in, place_of
from builder.toolkit.made import (
    note_changes,
    note_left_out,
    note_steps,
    several_to_json,
    several_to_text,
    to_json,
    to_text,
)
from builder.workspace import Workspace


@click.command("build", cls=Command)
@recipes_argument
@click.option("-o", "--output", type=NAME, help="Where the output goes; its name says in which form.")
@click.option("--locked", is_flag=True, help="Fail if the lock would change, and show how.")
@click.option("--offline", is_flag=True, help="Use no network.")
@click.option("--frozen", is_flag=True, help="Both --locked and --offline.")
@click.option("--partial", is_flag=True, help="Fetch only parts of files, on the lock's word.")
@click.option("--check", is_flag=True, help="Build everything a second time without the store, and compare.")
@click.option("--statement", is_flag=True, help="Write what each output was made of beside it, for others.")
@click.option("--sign", type=FILE, metavar="KEY", help="Write that statement, signed with an Ed25519 key.")
@click.option("--explain", "explained", is_flag=True, help="Say why each step is done or not.")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads to use; the bytes are the same.")
@sharing
@click.option("--on", "where", metavar="dask://HOST:PORT", help="Have workers make it, by the shared store.")
@click.option("--only", metavar="KEY", help="Make this node of the plan alone; no lock is written.")
@click.option("--keep-going", is_flag=True, help="Of several recipes, build all that can be built.")
@locking
@outside_option
@format_option
@json_option
@quiet_option
def command(
    recipes: tuple[Path | str, ...],
    output: str | None,
    locked: bool,
    offline: bool,
    frozen: bool,
    partial: bool,
    check: bool,
    statement: bool,
    sign: Path | None,
    explained: bool,
    threads: int | None,
    shared: str | None,
    share: bool,
    where: str | None,
    only: str | None,
    keep_going: bool,
    lock: Path | None,
    no_lock: bool,
    outside: bool,
    quiet: bool,
) -> int:
    """Build the files of RECIPE; what is made already is reused, what is unchanged is left alone.

    Several recipes, or all in a folder and below it, are built as one: what they share is read and made once.
    """
    if where is not None and partial:
        raise UsageError(Problem("`--on` and `--partial` exclude each other"))
    if only is not None:
        whole = {"on": where, "output": output, "locked": locked, "frozen": frozen, "partial": partial}
        _check_only(recipes, whole | {"check": check, "statement": statement, "sign": sign})
    if no_lock and (locked or frozen):
        raise UsageError(Problem("`--locked` needs a lock, and `--no-lock` has none"))
    key = PrivateKey.read(sign, "--sign") if sign is not None else None
    with (
        open_workspace(
            quiet, offline=offline or frozen, outside=outside, shared=shared, share=share
        ) as workspace,
        workspace.sources() as sources,
        ExitStack() as context,
    ):

        def before(plan: Plan) -> None:
            if explained and out().as_json:
                out().data["plan"] = explain.to_json(plan)
            elif explained:
                out().message(explain.to_text(plan))
            note_left_out(plan, workspace.reporter)
            note_steps(plan, workspace.reporter)

        if where is not None:  # workers are in other folders
            recipes = tuple(local(recipe, "`--on`") for recipe in recipes)
            context.enter_context(as_given(recipes))
            output = whole_name(output) if output is not None else None
        how: dict[str, Any] = {
            "locked": locked or frozen,
            "partial": partial,
            "check": check,
            "explained": explained,
            "threads": threads,
            "statements": Statements.of(workspace, key) if statement or key is not None else None,
            "elsewhere": context.enter_context(_workers(workspace, where, threads)),
        }
        if are_several(recipes):
            one_only(recipes, lock=lock)
            place = place_in(output) if output is not None else None
            found = read_recipes(workspace, recipes, lock_place(lock, no_lock))
            for outcome in found:
                outcome.recipe = outcome.recipe and (outcome.recipe.absolute() if where else outcome.recipe)
            build_several(workspace, found, sources, place=place, keep_going=keep_going, **how)
            return ExitCode.DONE
        read = workspace.recipe(recipes[0], lock_place(lock, no_lock))
        read = read.absolute() if where is not None else read
        if only is not None:
            return _make_only(workspace, read, sources, only, threads)
        made = build_recipe(workspace, read, sources, place=place_of(read, output), before=before, **how)
        note_changes(made, workspace.reporter)
    out().cases.append(Case(str(recipes[0])))
    out().result(to_json(made), to_text(made))
    return ExitCode.DONE


def _check_only(recipes: Sequence[Path | str], whole: Mapping[str, object]) -> None:
    """Raise UsageError where options for a whole recipe, or several recipes, are given for a node alone."""
    if are_several(recipes):
        raise UsageError(Problem("`--only` is for one recipe", hint="name the one whose plan has the key"))
    if (named := next((name for name, given in whole.items() if given), None)) is not None:
        hint = f"`--{named}` is for a recipe that is built whole"
        raise UsageError(Problem(f"`--only` and `--{named}` exclude each other", hint=hint))


@contextmanager
def _workers(workspace: Workspace, where: str | None, threads: int | None) -> Iterator[Elsewhere | None]:
    """The workers that are to make it, or None."""
    if where is None:
        yield None
        return
    from builder.build.dask import workers_on

    settings = workspace.settings
    if not settings.shared:
        hint = "`--store URL` names one, which here and every worker reaches"
        raise UsageError(Problem("`--on` needs a store that the workers share", hint=hint))
    means = means_of(settings, offline=workspace.offline, outside=workspace.outside, threads=threads)
    with workers_on(where, means, workspace.reporter) as farm:
        yield farm


def _make_only(workspace: Workspace, recipe: Recipe, sources: Sources, key: str, threads: int | None) -> int:
    node, done = build_node(workspace, recipe, sources, key, threads=threads)
    state = done.product.built.state if done.product is not None else "made" if done.fresh else "stored"
    data = {"schema": 1, "key": node.key, "label": node.label, "state": state}
    out().result(data, f"{state:<9}  {printable(node.label)}")
    return ExitCode.DONE


class _Once(Reporter):
    """Passes each note on once: a thousand recipes have most of them in common."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._said = reporter, set[str]()

    def note(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._reporter.note(message)


def build_several(
    workspace: Workspace, outcomes: Sequence[Outcome], sources: Sources, *, explained: bool, **how: Any
) -> None:
    """Build recipes, and say what became of each; raises SeveralError where one has failed."""

    def before(plans: Sequence[Plan]) -> None:
        if explained and out().as_json:
            data = explain.to_json(joined(plans), [p.recipe for p in plans])
            out().data.setdefault("plans", []).append(data)
        elif explained:
            out().message(explain.to_text(joined(plans)))
        for plan in plans:
            note_left_out(plan, once)
            note_steps(plan, once)

    once = _Once(workspace.reporter)
    Several(workspace, outcomes, sources, before=before, explained=explained, **how).build()
    for outcome in outcomes:
        if outcome.made is not None:
            note_changes(outcome.made, once)
    out().result(several_to_json(outcomes), several_to_text(outcomes))
    told(outcomes)

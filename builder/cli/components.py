"""`ckpt components`: what the catalog knows, and a new table for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from builder.base.errors import CatalogError, Problem, UsageError, nearest, printable
from builder.base.page import cells, columns, pad
from builder.base.words import spelling
from builder.cli.command import Group
from builder.cli.options import FILE, json_option
from builder.cli.terminal import make_reporter, out
from builder.formats import open_checkpoint
from builder.models.catalog import Architecture, Catalog, Component, TensorRule, load_catalog
from builder.models.catalog.learn import compress, fold, string
from builder.models.parts import meant
from builder.tensors.lazy import LazyTensor


@click.group("components", cls=Group, invoke_without_command=True)
@json_option
@click.pass_context
def command(context: click.Context) -> None:
    """The catalog: list its components (the default), show one, learn a new one.

    The folders that CKPT_COMPONENTS names add to what is built in.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_components)


@command.command("list")
@json_option
def list_components() -> None:
    """All components, under the architectures and classes that they fill."""
    catalog = load_catalog()
    described = [_described(c, catalog) for c in catalog.components.values()]
    architectures = [_architecture(a) for a in catalog.architectures.values()]
    data = {"components": described, "architectures": architectures}
    out().result(data, "\n".join(_listing(catalog)))


@command.command()
@click.argument("name", metavar="NAME", shell_complete=lambda _, __, begun: _names(begun))
@click.option("--full", is_flag=True, help="Every tensor on a line of its own.")
@json_option
def show(name: str, full: bool) -> None:
    """The meaning of one component: its class, its prefix and its tensors."""
    catalog = load_catalog()
    component = _component(name, catalog)
    rules = {n: rule._asdict() for n, rule in component.tensors.items()}
    data = {**_described(component, catalog), "tensors": rules}
    out().result(data, "\n".join(_meaning(component, catalog, full)))


@command.command()
@click.argument("file", type=FILE, metavar="FILE")
@click.option("-o", "--output", type=FILE, metavar="FOLDER", help="Write NAME.toml there.")
@click.option("--name", help="The component's name (default: the file's).")
@click.option("--class", "cls", help="The class that it fills (default: one of its own).")
@click.option("--prefix", default="", help="Take only the tensors under this prefix, and cut it off.")
@click.option("--weights", is_flag=True, help="Write whose weights its known components have, not a table.")
@json_option
def learn(
    file: Path, output: Path | None, name: str | None, cls: str | None, prefix: str, weights: bool
) -> None:
    """Write a component's table from a checkpoint, to stdout or to a folder of tables.

    Such a folder, named in CKPT_COMPONENTS, makes the component known to every command. With --weights,
    the digests of FILE's components are written, by which they are known under the name in any file.
    """
    catalog = load_catalog()
    if weights:
        if cls is not None or prefix:
            option = "--class" if cls is not None else "--prefix"
            raise UsageError(Problem(f"`{option}` cannot go with `--weights`", hint="leave it out"))
        _learn_weights(file, output, name or file.stem, catalog)
        return
    name = name or re.sub(r"[^\w.+-]+", "-", file.stem).strip("-.")[:100] or "component"
    for word, what in ((name, "component"), (cls or name, "class")):
        if not re.fullmatch(r"\w[\w.+-]{0,99}", word):
            hint = "use letters, digits, `-` and `.`, at most 100 of them"
            raise UsageError(Problem(f"`{word}` is no name for a {what}", hint=hint))
    with open_checkpoint(file, catalog.layouts) as checkpoint:
        rules = {n.removeprefix(prefix): _rule(t) for n, t in checkpoint.items() if n.startswith(prefix)}
        if not rules:
            raise UsageError(_nothing_under(prefix, file, checkpoint))
    same = _same(rules, catalog)
    if same is not None:
        out().note(f"this is the table of `{same}`")
    fields = {"name": name, "class": cls or name} | ({"prefix": prefix} if prefix else {})
    text = compress(rules, **fields)
    path = output / f"{name}.toml" if output is not None else None
    if path is not None:
        _write(path, text, name, catalog)
    _tell(name, text, path, path and path.parent)


def _names(begun: str) -> list[str]:
    """The components whose names begin so."""
    return [name for name in load_catalog().components if spelling(name).startswith(spelling(begun))]


def _component(word: str, catalog: Catalog) -> Component:
    """The component of a name, whatever its case; raises UsageError, of a wider word with what it means."""
    names = {spelling(name): name for name in catalog.components}
    architecture = catalog.spellings.get(spelling(word))
    classes = architecture.slots if architecture is not None else meant(word, catalog.classes)
    if (name := names.get(spelling(word))) is None and classes:
        what = "an architecture" if architecture is not None else "a class" if len(classes) == 1 else "a kind"
        members = ", ".join(f"`{c.name}`" for cls in classes for c in catalog.classes[cls])
        raise UsageError(Problem(f"`{word}` is {what}, not a component", hint=f"its components: {members}"))
    return catalog.component(name or word)


def _tell(name: str, text: str, path: Path | None, folder: Path | None) -> None:
    """A table that was learned: where it is, or else the table itself."""
    out().raw({"path": path and str(path), "name": name, "table": text}, text if path is None else "")
    if path is not None:
        out().say(printable(f"written  {path}; CKPT_COMPONENTS={folder} makes it known"))


def _learn_weights(file: Path, output: Path | None, name: str, catalog: Catalog) -> None:
    """Write the digests of a file's components as those of well-known weights."""
    from builder.reports.inspect import build_report

    if not 0 < len(name) <= 100 or not name.isprintable() or not name.strip():
        raise UsageError(Problem(f"`{printable(name)}` is no name", hint="give one with `--name`"))
    with make_reporter() as reporter:
        report = build_report(file, catalog=catalog, reporter=reporter)
    parts = [p for p in report.parts if not p.match.ema or len(report.parts) == 1]
    if not parts:
        hint = "`ckpt inspect` says what is in it"
        raise UsageError(Problem(f"`{file}` has no component that the catalog knows", hint=hint))
    entries = []
    for part in parts:
        if part.digest is None:
            what = f"{part.match.component.name} is in parts, as diffusers has it: its weights have no digest"
            out().note(what)
            continue
        if part.published is not None:
            known = part.published.name
            out().note(f"the weights of {part.match.component.name} are known as `{known}`")
            continue
        fields = {"name": name, "class": part.match.component.cls, "blake3": part.digest}
        entries.append("\n".join(["[[component]]", *(f"{k} = {string(v)}" for k, v in fields.items())]))
    text = "\n\n".join(entries) + "\n" if entries else ""
    if output is None or not entries:
        _tell(name, text, None, None)
        return
    stem = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "weights"
    path = output / "known" / f"{stem}.toml"
    _create(path, text)
    _tell(name, text, path, output)


def _listing(catalog: Catalog) -> Iterator[str]:
    sections: list[tuple[str, list[tuple[str, Component]]]] = []
    placed: set[str] = set()
    for architecture in catalog.architectures.values():
        rows = [(cls, c) for cls in architecture.slots for c in catalog.candidates(cls, architecture)]
        placed |= {c.name for _, c in rows}
        also = f" (also {', '.join(architecture.aliases)})" if architecture.aliases else ""
        sections.append((architecture.name + also, rows))
    rest = sorted((c.cls, c.name) for c in catalog.components.values() if c.name not in placed)
    if rest:
        sections.append(("in no architecture", [(cls, catalog.components[name]) for cls, name in rest]))
    for number, (title, rows) in enumerate(sections):
        yield from [""] * (number > 0)
        yield title
        lines = []
        for n, (cls, c) in enumerate(rows):
            label = "" if n and rows[n - 1][0] == cls else cls
            size = f"{c.parameters:,}" if c.parameters is not None else "any rank"
            lines.append((label, c.name, f"{c.keys:,}", size, printable(c.prefix)))
        yield from columns(lines, {2, 3}, indent=2)
    yield ""
    yield "Columns: class, component, tensors, elements, prefix in a full checkpoint."


def _meaning(component: Component, catalog: Catalog, full: bool) -> Iterator[str]:
    size = f"{component.parameters:,} elements" if component.parameters is not None else "of any rank"
    optional = sum(rule.optional for rule in component.tensors.values())
    yield component.name + (f": {component.note}" if component.note else "")
    rows = {
        "class": component.cls,
        "architectures": ", ".join(_homes(component, catalog)) or "none",
        "prefix": printable(component.prefix) or "none",
        "tensors": f"{component.keys:,}, {size}" + (f"; {optional} optional" if optional else ""),
        "extends": component.extends or "",
        "naming": component.naming or "",
        "precision": component.precision,
        "models": ", ".join(map(printable, component.models)),
        "declared in": component.path,
    }
    for label, value in rows.items():
        if value:
            yield f"  {label:<13}  {value}"
    yield ""
    if full:
        lines = [(n, _shape(rule)) for n, rule in component.tensors.items()]
    else:
        # Other names for the tensors of a base say less than the base itself.
        tensors = component.plain if component.naming else component.tensors
        lines = [(".".join(path), shape) for path, shape in fold(tensors)]
        if component.naming:
            yield f"  the tensors of {component.base}, their names {component.naming.replace('-', ' ')}:"
            yield ""
    width = min(72, max(cells(printable(name)) for name, _ in lines))
    for name, shape in lines:
        yield f"  {pad(printable(name), width)}  {shape}"


def _shape(rule: TensorRule) -> str:
    return " ".join(
        [str(list(rule.shape)), *([rule.dtype] if rule.dtype else []), *["optional"] * rule.optional]
    )


def _homes(component: Component, catalog: Catalog) -> list[str]:
    return [
        a.name
        for a in catalog.architectures.values()
        if component.cls in a.slots and component in catalog.candidates(component.cls, a)
    ]


def _described(component: Component, catalog: Catalog) -> dict[str, Any]:
    return {
        "name": component.name,
        "class": component.cls,
        "architectures": _homes(component, catalog),
        "prefix": component.prefix,
        "keys": component.keys,
        "parameters": component.parameters,
        "precision": component.precision,
        "models": list(component.models),
        "extends": component.extends,
        "naming": component.naming,
        "note": component.note,
        "path": component.path,
    }


def _architecture(architecture: Architecture) -> dict[str, Any]:
    return {
        "name": architecture.name,
        "slots": list(architecture.slots),
        "may_lack": list(architecture.may_lack),
        "only": list(architecture.only),
        "aliases": list(architecture.aliases),
        "modelspec": architecture.modelspec and architecture.modelspec.architecture,
    }


def _rule(tensor: LazyTensor) -> TensorRule:
    """What a file's tensor says of its kind: numbers of any precision will do, other types are meant."""
    return TensorRule(tensor.shape, None if tensor.dtype.floating else tensor.dtype.code)


def _nothing_under(prefix: str, file: Path, names: Mapping[str, LazyTensor]) -> Problem:
    if not names:
        return Problem(f"`{file}` holds no tensors")
    tops = sorted({name.partition(".")[0] + "." for name in names if "." in name})
    near = nearest(prefix, tops)
    begin = (
        f"names begin with {', '.join(f'`{t}`' for t in tops[:8])}" if tops else "its names have no prefix"
    )
    return Problem(
        f"`{file}` has no tensor under `{prefix}`", hint=f"did you mean `{near}`?" if near else begin
    )


def _same(rules: Mapping[str, TensorRule], catalog: Catalog) -> str | None:
    """The component that these tensors are, by name and shape, if it is known."""
    shapes = {name: rule.shape for name, rule in rules.items()}
    for component in catalog.components.values():
        if component.keys == len(shapes) and {n: r.shape for n, r in component.tensors.items()} == shapes:
            return component.name
    return None


def _write(path: Path, text: str, name: str, catalog: Catalog) -> None:
    if name in catalog.components:
        where = catalog.components[name].path
        raise CatalogError(
            Problem(
                f"component `{name}` is known already",
                evidence=(f"declared in {where}",),
                hint="give another `--name`",
            )
        )
    _create(path, text)


def _create(path: Path, text: str) -> None:
    """Write a new file of a catalog; raises UsageError where there is one already, or none can be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as wrong:
        if isinstance(wrong, FileExistsError) and path.exists():
            raise UsageError(Problem(f"`{path}` is there already", hint="give another `--name`")) from None
        reason = (wrong.strerror or str(wrong)).lower()
        raise UsageError(Problem(f"cannot write `{path}`: {reason}")) from None

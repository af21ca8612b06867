"""The names of checkpoints, and those that files and recipes get after them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

from builder.base.errors import Problem, UsageError

Form = Literal["safetensors", "torch", "sharded", "diffusers", "gguf"]

# What the end of an output's name says of its form.
FORMS: dict[str, Form] = {
    ".safetensors": "safetensors",
    ".sft": "safetensors",
    ".ckpt": "torch",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".gguf": "gguf",
    ".safetensors.index.json": "sharded",
    "/": "diffusers",
}
SINGLE: tuple[Form, ...] = ("safetensors", "torch", "gguf")  # those that are one file
SUFFIXES = tuple(end for end, form in FORMS.items() if form in SINGLE)  # of checkpoints, read or written
# Of those, what is pruned: a model in blocks would only grow.
PRUNED = tuple(end for end in SUFFIXES if FORMS[end] != "gguf")
# Of a character class: what turns text around, or has no width, has a file's name read as another.
UNSEEN = r"\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
SHARD = re.compile(r".+-\d{5}-of-\d{5}\.(?:safetensors|bin)", re.IGNORECASE)
_DEVICE = re.compile(r"(?:con|prn|aux|nul|(?:com|lpt)[0-9¹²³]) *(?:\..*)?", re.IGNORECASE | re.DOTALL)
ENDING = rf"(?:{'|'.join(map(re.escape, SUFFIXES))})"  # as an expression
_ENDINGS = re.compile(rf"{ENDING}+(?![^\W_])", re.IGNORECASE)  # within a name too
_MODEL = re.compile(rf"(.+?){ENDING}?(?:\.index\.json)?", re.IGNORECASE | re.DOTALL)


def form_of(name: str) -> Form:
    """The form that an output's name asks for: by its end; a name without suffix is a diffusers folder.

    Raises UsageError for the suffix of some other kind of file.
    """
    for end, form in FORMS.items():
        if name.lower().endswith(end):
            return form
    strange = re.fullmatch(r"\.[A-Za-z]\w*", Path(name).suffix)
    if strange and not os.path.isdir(name):  # noqa: PTH112
        raise UsageError(
            Problem(
                f"`{name}` has the suffix of no container that can be written",
                evidence=(f"there are {', '.join(f'`{end}`' for end in FORMS)}",),
                hint="end a folder's name with `/`",
            )
        )
    return "diffusers"


def named(path: Path) -> Path:
    """A path that ends in a name: for `.` and `..` the whole path of the folder."""
    return path if path.name not in ("", "..") else path.resolve()


def stem(path: Path) -> str:
    """A checkpoint's name without its suffix, whatever dots it has: `Anything-V3.0` of `…-V3.0.ckpt`."""
    name = named(path).name
    match = _MODEL.fullmatch(name)
    return match[1] if match else name


class Target(NamedTuple):
    """Where something goes: a file, or a `folder` in which it gets a name of its own."""

    path: Path
    folder: bool = False

    @classmethod
    def named(cls, text: str) -> Target:
        """A folder is one that is there, or whose name ends in a slash."""
        return cls(Path(text), text.endswith(("/", os.sep)) or os.path.isdir(text))  # noqa: PTH112

    def file(self, name: str) -> Path:
        """The file itself, or the one of this name in the folder."""
        return self.path / name if self.folder else self.path


def whole_name(name: str) -> str:
    """The name of an output as a whole path; the slash at its end counts."""
    return f"{Path(name).absolute()}{'/' * name.endswith(('/', os.sep))}"


def recipe_name(path: Path, taken: Iterable[str] = ()) -> str:
    """A name for a recipe or a source after a file's, less what names may not hold, and unlike `taken`."""
    name = re.sub(r"[^\w.-]+", "-", _ENDINGS.sub("", stem(path))).strip("-_.")[:80].rstrip("-_.") or "model"
    if name == "NEW" or is_device(name):
        name = "model"
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def portable(name: str) -> str:
    """A file's name with `-` for what other file systems, or recipes, cannot have in it."""
    name = re.sub(rf'^~|[\x00-\x1f\x7f\\/:*?"<>|\ud800-\udfff{UNSEEN}]', "-", name)
    return f"-{name}" if is_device(name) else name


def is_device(name: str) -> bool:
    """Whether a file's name is that of a device on Windows, as is all that begins with one and a dot."""
    return _DEVICE.fullmatch(name) is not None


def numbered(path: Path, suffix: str | None = None) -> Iterator[Path]:
    """`path`, then `NAME(1).EXT`, `NAME(2).EXT`, … without end.

    `suffix` is what stays behind the number, if not the last suffix alone.
    """
    end = path.suffix if suffix is None else suffix
    assert path.name.endswith(end)
    front = path.name[: len(path.name) - len(end)]
    yield path
    for number in count(1):
        yield path.with_name(f"{front}({number}){end}")


def free_name(path: Path, suffix: str | None = None) -> Path:
    """The first of the `numbered` paths that is not taken."""
    return next(p for p in numbered(path, suffix) if not os.path.lexists(p))

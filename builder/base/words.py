"""The words of messages and reports: numbers with their nouns, lists cut short, names compared."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from builder.base.errors import clipped

CONTAINERS = {
    "safetensors": "safetensors",
    "safetensors-sharded": "sharded safetensors",
    "diffusers": "diffusers folder",
    "torch-zip": "PyTorch zip",
    "torch-legacy": "PyTorch legacy pickle",
    "torch-tar": "PyTorch tar",
    "gguf": "GGUF",
}
TYPES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}
EXAMPLES = 5

SIZE = r"[0-9]{1,15}(\.[0-9]{1,15})?\s*([KMGTkmgt]([Ii]?[Bb])?|[Bb])?"


def spelling(name: str) -> str:
    """A name as it is compared: without case, dashes, underscores and spaces."""
    return name.casefold().translate({ord(c): None for c in "-_ "})


def fits_pattern(pattern: str, name: str) -> bool:
    """Whether a name is spelt so, `*` standing for anything: each part is looked for once."""
    first, *middle, last = pattern.split("*")
    if len(name) < len(first) + len(last) or not (name.startswith(first) and name.endswith(last)):
        return False
    at, end = len(first), len(name) - len(last)
    for part in middle:
        at = name.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


def counted(number: int, noun: str) -> str:
    """A number and its noun, as in `1 key` and `1,131 keys`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def parse_size(text: str) -> int | None:
    """The bytes that a size such as `10GB` (decimal) or `2GiB` (binary) means; None: it is none."""
    if re.fullmatch(SIZE, text) is None:
        return None
    number, unit = re.findall(r"[0-9.]+|[A-Za-z]+", text.upper() + "B")[:2]
    return int(float(number) * (1024 if "I" in unit else 1000) ** "BKMGT".index(unit[0]))


def listed(names: tuple[str, ...], limit: int = EXAMPLES) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:limit])
    return shown + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


def either(names: Sequence[str]) -> str:
    """Names of which one is meant, as in `a, b or c`."""
    return " or ".join([*[", ".join(names[:-1])] * (len(names) > 1), *names[-1:]])


def examples(names: Sequence[str], limit: int) -> str:
    more = len(names) - limit
    return ", ".join(clipped(n, 80) for n in names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def grouped(names: Sequence[str], limit: int = 3) -> str:
    """What names there are, in few words: those with the same two first parts stand for each other."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".", 2)[:2]), []).append(name)
    told = [
        clipped(group[0] if len(group) == 1 else f"{head}.… ({len(group):,})", 80)
        for head, group in list(groups.items())[:limit]
    ]
    rest = len(names) - sum(map(len, list(groups.values())[:limit]))
    return ", ".join(told) + (f" and {rest:,} more" if rest else "")


def command_line(*words: object) -> str:
    """A command as it is typed in a shell; what does not print is spelt out, as `$'…'`."""
    return " ".join(["ckpt", *(_word(str(word)) for word in words)])


def _word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_letter, word))}'"


def _letter(letter: str) -> str:
    number = ord(letter)
    if letter.isprintable():
        return f"\\{letter}" if letter in "'\\" else letter
    if 0xDC80 <= number <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return f"\\U{number:08x}"

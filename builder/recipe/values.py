"""The words and other kinds of value that recipes hold: names, paths, digests, addresses, classes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from builder.base.addresses import FORMS, check_address
from builder.base.errors import UsageError, nearest
from builder.base.kinds import (
    NO_CONTROLS,
    NOT_EMPTY,
    WRONG,
    At,
    Boolean,
    Choice,
    Either,
    Kind,
    Number,
    Rule,
    Schema,
    Text,
    listed,
)
from builder.base.words import SIZE, parse_size
from builder.models.parts import kind, meant
from builder.recipe.names import ENDING, UNSEEN, Form
from builder.recipe.names import FORMS as OUTPUT_FORMS
from builder.recipe.recipe import FORMAT

if TYPE_CHECKING:
    from builder.models.catalog import Catalog

NEW = "NEW"
EMA = "EMA"  # in place of a component: the average of what the slot is for
PRECISIONS = {
    "fp16": "half precision",
    "bf16": "brain floating point",
    "fp32": "single precision",
    "keep": "each tensor as its source has it",
}
PUBLISHED = "published"
OUTPUT_PRECISIONS = {
    PUBLISHED: "each component as the catalog says that it is published, nothing made wider",
    **PRECISIONS,
}


class Quantization(NamedTuple):
    """A way to pack weights: what it is, and the forms of outputs that hold it."""

    doc: str
    forms: tuple[Form, ...] = ("safetensors", "torch", "sharded")


QUANTIZE = {
    "fp8": Quantization("FP8 (E4M3) with an FP32 scale for each weight, ComfyUI's `float8_e4m3fn`"),
    "int8": Quantization("integers of 8 bits with an FP32 scale for each row, ComfyUI's `int8_tensorwise`"),
    "q8_0": Quantization("blocks of 32 numbers of 8 bits and their scale, in a GGUF file", ("gguf",)),
}
NARROW = {"fewer": "what has fewer bits keeps its type"}
OVERFLOW = {
    "error": "the build fails and names the tensor",
    "clamp": "the largest finite value takes its place",
    "keep": "it becomes infinite",
}
ARITHMETIC = {
    "exact": "FP32, rounded once, in the output",
    "file": "each product and sum rounded to the type of the files, as A1111 does",
}
UNKNOWN = {
    "drop": "they are left out, and counted; refused when they are most of the base",
    "keep": "they are carried over as they are",
}
PREDICTIONS = {"epsilon": "the noise", "v": "the velocity between noise and picture"}
NON_FINITE = {"error": "the build fails and names the tensor", "keep": "it stays"}

CLEAN = (NOT_EMPTY, NO_CONTROLS)
SHOWN = Rule(
    f"[{UNSEEN}]",
    "{key} holds a character that does not show, or turns others around",
    forbid=True,
)
NAME = Text(
    (
        *CLEAN,
        SHOWN,
        Rule(r"^\s|\s$", "{key} begins or ends with a space", forbid=True),
        Rule(r'[/\\:*?"<>|]', '{key} holds one of / \\ : * ? " < > |, which file names cannot', forbid=True),
        Rule(r"^\.|\.$", "{key} begins or ends with a dot", forbid=True),
        Rule(
            rf"{ENDING}$",
            "{key} ends as the name of a file does",
            "leave the ending out: `file` under [output] says what is written",
            forbid=True,
        ),
        Rule(r"^.{1,100}$", "{key} is longer than 100 characters"),
    ),
    examples=("anything-v3",),
)
WORD = Text(
    (
        *CLEAN,
        Rule(r"^\s|\s$", "{key} begins or ends with a space", forbid=True),
        Rule(r"^NEW(\s|$)", "{key} reads as a new architecture", "choose another name", forbid=True),
    )
)
REFERENCE = Text(CLEAN, label="name of a source or step")
PATH = Text(CLEAN, label="path")


@dataclass(frozen=True)
class Address(Text):
    """A string that spells an address; its fine print is known to the module that follows addresses."""

    def check(self, value: str, at: At) -> Any:
        read = super().check(value, at)
        fault = check_address(value) if read is not WRONG else None
        # What is no address may be anything, a secret too: it is not shown.
        return read if fault is None else at.wrong(fault.fact, hint=fault.hint, show=False)


SHA256 = Text(
    (
        NO_CONTROLS,
        Rule(
            r"^[0-9A-Fa-f]{1,63}$",
            "{key} has {count} digits, a SHA-256 has 64: short hashes collide and pin nothing",
            "`ckpt inspect --hashes FILE` shows the whole digest",
            forbid=True,
        ),
        Rule(
            r"^[0-9A-Fa-f]{64}$",
            "{key} must be a SHA-256: 64 hexadecimal digits",
            "`ckpt inspect --hashes FILE` shows the digest",
        ),
    ),
    lower=True,
    label="64 hexadecimal digits",
)
URL = Address(
    (
        *CLEAN,
        Rule(
            r"^[A-Za-z]+://[^/?#]*@"
            r"|[?&]([^=&#]*([Tt]oken|[Ss]ecret|[Pp]assword|[Ss]ignature)[^=&#]*|(api[-_]?)?key)=",
            "{key} holds a secret, which would be shared with the recipe",
            "leave it out: tokens are read from the environment, as `CIVITAI_TOKEN` and `HF_TOKEN`",
            forbid=True,
            secret=True,
        ),
        Rule(
            r"^http://(?!localhost[:/]|127\.0\.0\.1[:/]|\[::1\][:/])",
            "`http://` is refused: what it brings can be changed on the way",
            "use `https://`",
            forbid=True,
        ),
        Rule(
            r"^(https?://|hf://|civitai:|file:|([A-Za-z0-9_-]+:){3})",
            "{key} is no address of a known kind",
            f"an address is {FORMS}",
        ),
    ),
    label="address",
    most=2048,  # of which most programs take no more, either
)
PROSE = Rule(r"[\x00-\x08\x0b-\x1f\x7f]", "{key} holds a control character", forbid=True)
_INSIDE = (
    *CLEAN,
    Rule(r"\\", "{key} holds a backslash, which is no separator elsewhere", "write `/`", forbid=True),
    Rule(
        r"^/|^[A-Za-z]:[/\\]|^~|(^|/)\.\.(/|$)",
        "{key} leaves the recipe's folder",
        "give a path inside it; `ckpt build -o FILE` writes elsewhere",
        forbid=True,
    ),
    Rule(r'[:*?"<>|]', '{key} holds one of : * ? " < > |, which file names cannot', forbid=True),
)
_SUFFIXES = [end for end in OUTPUT_FORMS if end != "/"]
OUTPUT_FILE = Text(
    (
        *_INSIDE,
        SHOWN,
        Rule(
            rf"[^/]({'|'.join(map(re.escape, _SUFFIXES))})$|[^/.]/$",
            f"{{key}} must end in {', '.join(f'`{end}`' for end in _SUFFIXES)}, or, a folder's, in `/`",
        ),
    ),
    label="path",
)
INSIDE = Text(_INSIDE, label="path")
CONFIG_FILE = Text(
    (*_INSIDE, Rule(r"[^/]\.ya?ml$", "{key} must end in `.yaml`", "give the model's configuration")),
    label="path",
)
AUTOV3 = Text(
    (
        NO_CONTROLS,
        Rule(
            r"^([0-9A-Fa-f]{12}|[0-9A-Fa-f]{64})$",
            "{key} must be an AutoV3, 12 hexadecimal digits, or all 64 of `sshs_model_hash`",
            "`ckpt inspect --hashes FILE` shows both",
        ),
    ),
    lower=True,
    label="12 or 64 hexadecimal digits",
)
METRIC = Text(
    (
        NO_CONTROLS,
        Rule(
            r"^([0-9]{4}|----)/([0-9]{4}|----)/([0-9]{4}|----)$",
            "{key} must be three groups of four digits: UNET/VAE/CLIP",
            "write it as `2020/2982/0130`, with `----` for what is absent",
        ),
    ),
    label="metric",
)

# What the tool says of the product itself: a recipe cannot contradict it.
RESERVED = Rule(
    r"^(ckpt\..*|modelspec\.(sai_model_spec|architecture|implementation|hash_sha256))$",
    "{key} is written by the build itself",
    "remove it",
    forbid=True,
)


@dataclass(frozen=True)
class Metadata(Kind):
    """Names and strings; a table inside stands for names with a dot. Gives a flat dict."""

    noun: str = "a table"
    label: str = "table of strings"
    types: tuple[type, ...] = (dict,)

    def check(self, value: dict[str, Any], at: At) -> Any:
        found: dict[str, str] = {}
        self._flatten(value, at, "", found)
        return found

    def _flatten(self, value: dict[str, Any], at: At, above: str, found: dict[str, str]) -> None:
        for key, item in value.items():
            name, below = above + key, at.down(key)
            if isinstance(item, dict):
                self._flatten(item, below, f"{name}.", found)
            elif RESERVED.broken_by(name):
                below.wrong(RESERVED.fact.format(key=f"`{name}`"), hint=RESERVED.hint, key=True)
            elif name in found:
                below.wrong(f"`{name}` is given twice", hint="remove one of the two", key=True)
            elif (read := METADATA_VALUE.read(item, below)) is not WRONG:
                found[name] = read

    def schema(self, defs: Schema) -> Schema:
        nested = {"$ref": "#/$defs/metadata"}
        defs["metadata"] = {
            "type": "object",
            "propertyNames": RESERVED.schema(),
            "additionalProperties": {"oneOf": [{"type": "string"}, nested]},
        }
        return nested


METADATA_VALUE = Text()


@dataclass(frozen=True)
class Format(Kind):
    """The version of the language, which is one."""

    noun: str = "an integer"
    label: str = f"`{FORMAT}`"
    types: tuple[type, ...] = (int,)

    def advice(self, value: object) -> str | None:
        return f"write `format = {FORMAT}`"

    def check(self, value: int, at: At) -> Any:
        if value != FORMAT:
            return at.wrong(
                f"format {value} is not known: this version reads format {FORMAT}",
                hint="update ckpt-build" if value > FORMAT else f"write `format = {FORMAT}`",
            )
        return value

    def schema(self, defs: Schema) -> Schema:
        return {"const": FORMAT}


@dataclass(frozen=True)
class Base(Kind):
    """`NEW` and an architecture, or the name of a source or step; gives the words as written."""

    architectures: tuple[str, ...]
    noun: str = "a string"
    label: str = "`NEW ARCHITECTURE`, or name of a source or step"
    types: tuple[type, ...] = (str,)

    def check(self, value: str, at: At) -> Any:
        return REFERENCE.check(value, at)

    def schema(self, defs: Schema) -> Schema:
        return {
            "anyOf": [
                {"enum": [f"{NEW} {a}" for a in self.architectures]},
                {"type": "string", "minLength": 1},
            ]
        }


@dataclass(frozen=True)
class Size(Kind):
    """Bytes: an integer, or a string with a unit; gives the integer."""

    noun: str = "an integer or a string"
    label: str = "integer, or string such as `2GB`"
    types: tuple[type, ...] = (int, str)

    def check(self, value: Any, at: At) -> Any:
        size = parse_size(value) if isinstance(value, str) else value
        if size is None:
            return at.wrong(f"{at.name} is no size", hint="write it as `2GB`, `500MB` or a number of bytes")
        return Number(1, whole=True).check(size, at)

    def schema(self, defs: Schema) -> Schema:
        text = {"type": "string", "pattern": f"^{SIZE}$"}
        return {"oneOf": [Number(1, whole=True).schema(defs), text]}


@dataclass(frozen=True)
class Values(Kind):
    """A table of numbers, strings and booleans by name; what they mean is known elsewhere."""

    noun: str = "a table"
    label: str = "table of numbers, strings and booleans"
    types: tuple[type, ...] = (dict,)

    def check(self, value: dict[str, Any], at: At) -> Any:
        kind = Either((Boolean(), Number(), Text(CLEAN)))
        read = {k: kind.read(v, at.down(k)) for k, v in value.items()}
        return WRONG if WRONG in read.values() else read

    def schema(self, defs: Schema) -> Schema:
        values = Either((Boolean(), Number(), Text(CLEAN))).schema(defs)
        return {"type": "object", "additionalProperties": values}


@dataclass(frozen=True)
class Slot(Choice):
    """A class, or a kind of them (`VAE`); what may have been meant is of the recipe's architecture."""

    catalog: Catalog | None = None

    @classmethod
    def of(cls, catalog: Catalog) -> Slot:
        """The classes of a catalog, and their kinds."""
        return cls(
            "class", dict.fromkeys([*catalog.classes, *map(kind, catalog.classes)], ""), True, catalog=catalog
        )

    def hint(self, value: str, at: At) -> str | None:
        assert self.catalog is not None
        near = nearest(value, self.words)
        first, _, name = str(_base_of(at)).partition(" ")
        if first != NEW:
            return f"did you mean `{kind(near)}`?" if near else None
        try:
            slots = self.catalog.architecture(name.strip()).slots
        except UsageError:
            return None
        alike = meant(kind(near), slots) if near else ()
        found = alike[0] if len(alike) == 1 else nearest(value, alike or slots)
        return f"did you mean `{found}`?" if found else f"its slots: {listed(slots)}"


def _base_of(at: At) -> object:
    """The base that is written for what stands at a place: the output's own, or the recipe's."""
    data = at.document.data
    own = data["output"] if at.keys[0] == "output" else {}
    if isinstance(own, list) and isinstance(at.keys[1], int):
        own = own[at.keys[1]]
    return own.get("base", data.get("base")) if isinstance(own, dict) else None

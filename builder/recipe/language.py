"""The recipe language as data: every table, key, default and explanation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from builder.base.errors import CatalogError, Place, Problem, did_you_mean
from builder.base.kinds import (
    NOT_EMPTY,
    WRONG,
    Array,
    At,
    Boolean,
    Choice,
    Either,
    Key,
    Kind,
    Number,
    Rule,
    Schema,
    Struct,
    Table,
    Text,
)
from builder.models.prediction import EMPTY
from builder.operations.fixes import Fix
from builder.operations.registry import Operation, Param
from builder.recipe.profiles import PROFILES
from builder.recipe.recipe import FORMAT
from builder.recipe.values import (
    ARITHMETIC,
    AUTOV3,
    CLEAN,
    CONFIG_FILE,
    EMA,
    INSIDE,
    METRIC,
    NAME,
    NARROW,
    NON_FINITE,
    OUTPUT_FILE,
    OUTPUT_PRECISIONS,
    OVERFLOW,
    PATH,
    PRECISIONS,
    PREDICTIONS,
    PROSE,
    PUBLISHED,
    QUANTIZE,
    REFERENCE,
    SHA256,
    UNKNOWN,
    URL,
    WORD,
    Base,
    Format,
    Metadata,
    Size,
    Slot,
    Values,
)
from builder.recipe.weights import BlockWeights

if TYPE_CHECKING:
    from builder.models.catalog import Catalog


@dataclass(frozen=True)
class Vocabulary:
    """The words that recipes may use: of the catalog and of the registries."""

    catalog: Catalog
    operations: Mapping[str, Operation]
    fixes: Mapping[str, Fix]

    @cached_property
    def language(self) -> Struct:
        """The whole recipe, as the kind of its top-level table.

        Raises CatalogError when the catalog speaks of a fix that there is not.
        """
        for cls, traits in self.catalog.traits.items():
            for fix in traits.fixes:
                if fix not in self.fixes:
                    fact, hint = f"class `{cls}` names an unknown fix `{fix}`", did_you_mean(fix, self.fixes)
                    raise CatalogError(Problem(fact, Place(traits.path), hint=hint))
        return _language(self)


PARAMS: dict[str, Any] = {
    "values": lambda p, _: Values(),
    "number": lambda p, _: Number(p.minimum, p.maximum),
    "integer": lambda p, _: Number(p.minimum, p.maximum, whole=True),
    "string": lambda p, _: Text(CLEAN),
    "boolean": lambda p, _: Boolean(),
    "choice": lambda p, _: Choice("choice", dict.fromkeys(p.choices, "")),
    "weights": lambda p, catalog: BlockWeights.of(catalog, Number(p.minimum, p.maximum)),
}


def _param(param: Param, catalog: Catalog) -> Key:
    kind: Kind = PARAMS[param.kind](param, catalog)
    examples = {"number": "0.5", "weights": "0.5", "integer": "1", "boolean": "true", "values": "{ }"}
    example = examples.get(param.kind, '"…"')
    required = param.default is None and not param.optional
    return Key(kind, param.doc, example, required=required, default=param.default)


@dataclass(frozen=True)
class StepKind(Kind):
    """A step: its operation says which other keys it has."""

    operations: Mapping[str, Struct]
    noun: str = "a table"
    label: str = "table"
    types: tuple[type, ...] = (dict,)

    @property
    def op(self) -> Choice:
        """The kind of the key that decides."""
        plain = {n: s.heading for n, s in self.operations.items() if not n.endswith(":")}
        return Choice("operation", plain)

    def check(self, value: dict[str, Any], at: At) -> Any:
        if "op" not in value:
            return at.wrong("`op` is missing", hint='add `op = "…"`, the operation', key=True)
        said = value["op"]
        name, colon, _ = said.partition(":") if isinstance(said, str) else ("", "", "")
        if colon and f"{name}:" in self.operations:
            found = self.operations[f"{name}:"].check(value, at)
            return found if "op" in found else WRONG
        op = self.op.read(said, at.down("op"))
        return WRONG if op is WRONG else self.operations[op].check(value, at)

    def schema(self, defs: Schema) -> Schema:
        if not self.operations:
            return {"type": "object", "properties": {"op": {"type": "string"}}, "required": ["op"]}
        return {"oneOf": [s.schema(defs) for s in self.operations.values()]}


def step_keys(catalog: Catalog) -> dict[str, Key]:
    """The keys that every step has, beside those of its operation."""
    classes = Slot.of(catalog)
    return {
        "components": Key(
            Array(classes, minimum=1),
            "Only these classes, or kinds of them; the others are those of its first input.",
            '["UNET"]',
            default=(),
            otherwise="the whole model",
        ),
        "VAE": Key(
            Boolean(),
            "Whether the VAE is merged too, which breaks the colours of most; a weight for it says the same.",
            "true",
            default=False,
        ),
        "arithmetic": Key(
            Choice("arithmetic", ARITHMETIC), "In place of the recipe's.", '"file"', otherwise="the recipe's"
        ),
        "precision": Key(
            Choice("precision", PRECISIONS),
            "Type that what is made is rounded to, as if it were saved before it is used.",
            '"fp16"',
            otherwise="not rounded: FP32, or the files' type where the arithmetic is theirs",
        ),
        "store": Key(Boolean(), "Keep what is made in the store, for other recipes.", "true", default=False),
    }


def _operation(operation: Operation, catalog: Catalog) -> Struct:
    docs = dict.fromkeys(operation.files, "A LoRA, or a step that makes one.")
    inputs = {
        n: Key(REFERENCE, docs.get(n, "A source or step."), '"…"', required=True) for n in operation.inputs
    }
    optional = {n: Key(REFERENCE, "A source or step.", '"…"') for n in operation.optional_inputs}
    many: dict[str, Key] = {}
    if operation.many is not None:
        kinds: list[Kind] = [Array(REFERENCE, minimum=1)]
        doc, example = "Sources and steps.", '["a", "b"]'
        if operation.weighted:
            weights = BlockWeights.of(catalog, Number(), strengths=operation.many in operation.files)
            kinds.insert(0, Table(operation.many, WORD, weights, minimum=1))
            doc, example = "Sources and steps, each with its weight, or all with 1.", "{ a = 0.6, b = 0.4 }"
        if operation.many in operation.files:
            doc, example = "LoRAs, each with its strength, or all with 1.", "{ style = 0.6 }"
        required = not (operation.of_methods and operation.inputs)
        many[operation.many] = Key(Either(tuple(kinds)), doc, example, required=required)
    name = operation.name
    op: Kind = Choice("operation", {name: ""})
    if operation.of_methods:
        rule = Rule(rf"^{name}:[a-z][a-z0-9_]*$", f"{{key}} must be `{name}:` and the name of a method")
        op, name = Text((rule,), label=f"`{name}:METHOD`"), f"{name}:…"
    keys = {
        "op": Key(op, operation.doc, f'"{name}"', required=True),
        **inputs,
        **optional,
        **many,
        **{n: _param(p, catalog) for n, p in operation.params.items() if n != "method"},
        **step_keys(catalog),
    }
    name, what = f"op-{operation.name}", "how much is kept"
    return Struct(name, "[steps.NAME]", keys, any_of=operation.any_of, excludes=operation.excludes, what=what)


def _language(words: Vocabulary) -> Struct:
    catalog = words.catalog
    classes = Slot.of(catalog)
    notes = {n: c.note or "" for n, c in catalog.components.items()}
    components = Choice("component", notes | {EMA: "the average of what the slot is for"}, open=True)
    fixes = Array(Choice("fix", {n: f.doc for n, f in words.fixes.items()}))
    base = Base((*catalog.architectures, *catalog.classes))
    pick = Either(
        (
            REFERENCE,
            Struct(
                "pick-in-full",
                "[components]",
                {
                    "from": Key(REFERENCE, "The source or step that has it.", '"anything"', required=True),
                    "component": Key(
                        components,
                        "Which component of it: one of the class, its EMA twin (`EMA` says the same), or one "
                        "of the same tensors.",
                        '"UNET-v1-EMA"',
                        otherwise="the one it has of the class",
                    ),
                },
            ),
        ),
        name="pick",
    )
    picks = Table("components", classes, pick)
    expect = Struct(
        "expect",
        "[expect]",
        {
            "metric": Key(METRIC, "The metric, each of its numbers within 1.", '"2020/2982/0130"'),
            "sha256": Key(SHA256, "SHA-256 of the file.", '"8712e20a5d65…"'),
            "tensor_digest": Key(
                SHA256,
                "BLAKE3-256 over its tensors, metadata left out, as the build reports it.",
                '"67a1…"',
            ),
            "autov3": Key(
                AUTOV3,
                "SHA-256 over a safetensors file without its header, or the first 12 digits of it, by which "
                "sites and programs know a model whatever its metadata.",
                '"d0a5c5b5a3e1"',
            ),
            "size": Key(Number(1, whole=True), "Bytes of the file.", "2132626102"),
        },
    )
    base_key = Key(
        base,
        "What to start from: `NEW` and an architecture, every slot of which must then be filled; or a source "
        "or step, whose components fill every slot left open.",
        '"NEW SD-v1"',
        required=True,
    )
    components_key = Key(
        picks,
        "What fills each slot: by class, or by kind where the architecture has one of it, the name of a "
        "source or step, or a table of `from` and `component`. `EMA-…` classes may be added to those of the "
        "architecture.",
        '{ VAE = "nai-vae" }',
        default={},
    )
    fixes_key = Key(fixes, "Repairs to make, in any order.", '["clip-position-ids"]', default=())
    output = Struct(
        "output",
        "[output]",
        {
            "name": Key(NAME, "Its name, as one of `[[output]]`.", '"no-ema"', otherwise="the recipe's name"),
            "file": Key(
                OUTPUT_FILE,
                "Path inside the recipe's folder. Its ending says what is written. `.safetensors`, `.sft`: "
                "one file; `.ckpt`, `.pt`, `.pth`, `.bin`: a PyTorch file of tensors alone; "
                "`.gguf`: a diffusion model for programs that read GGUF; "
                "`.safetensors.index.json`: a sharded set, by its index; `/`: a folder in diffusers' layout.",
                '"anything-v3.safetensors"',
                otherwise="NAME.safetensors; of one with a `name`, RECIPE-NAME.safetensors",
            ),
            "precision": Key(
                Choice("precision", OUTPUT_PRECISIONS),
                "Type of its floating-point tensors, but of those that the catalog has kept in any.",
                '"bf16"',
                default=PUBLISHED,
            ),
            "narrow": Key(
                Either((Boolean(), Choice("way to round", NARROW))),
                "Whether only what has more bits than the precision is rounded, and nothing is made wider; "
                '`"fewer"`: what has fewer keeps its type.',
                "true",
                default=False,
            ),
            "quantize": Key(
                Choice("scheme", {word: q.doc for word, q in QUANTIZE.items()}),
                "How the weights of its denoiser's linear layers are packed; in a GGUF file, those of all "
                "layers.",
                '"fp8"',
            ),
            "overflow": Key(
                Choice("treatment", OVERFLOW),
                "What to do with a finite value too large for the precision.",
                '"clamp"',
                default="error",
            ),
            "non_finite": Key(
                Choice("treatment", NON_FINITE),
                "What to do with NaN and infinities.",
                '"keep"',
                default="error",
            ),
            "profile": Key(
                Choice("profile", {n: p.doc for n, p in PROFILES.items()}),
                "The program it is for, whose needs it is checked against.",
                '"a1111"',
            ),
            "keep": Key(
                Array(Text((NOT_EMPTY,), label="name of a tensor")),
                "Tensors to carry over from the base beside its components, by their full names: optional "
                "ones where it has them, and others that it must have. The class of a component that the "
                "architecture has no slot for carries all of that over.",
                '["alphas_cumprod"]',
                otherwise="all optional ones",
            ),
            "unknown": Key(
                Choice("treatment", UNKNOWN),
                "What to do with tensors of the base that are of no component, and no averages or junk.",
                '"keep"',
                default="drop",
            ),
            "markers": Key(
                Array(Choice("marker", dict.fromkeys(EMPTY, ""))),
                "Tensors by which programs know what a UNET predicts, in place of those that come with it.",
                '["v_pred", "ztsnr"]',
                otherwise="those that come with the UNET",
            ),
            "config": Key(
                CONFIG_FILE,
                "A `.yaml` inside the recipe's folder, to copy beside the output under the output's stem.",
                '"v1-inference-v.yaml"',
            ),
            "partial": Key(
                Boolean(),
                "Whether slots may stay open. Programs do not load such a file as a whole model.",
                "true",
                default=False,
            ),
            "verbatim": Key(
                Boolean(),
                "Whether it has every tensor of its base, which is a file, under the name it has there.",
                "true",
                default=False,
            ),
            "shard_size": Key(
                Size(),
                "Most bytes of tensors in a file of a set or a folder.",
                '"2GB"',
                otherwise="5 GB of a set; a folder's parts are whole",
            ),
            "prediction": Key(
                Choice("prediction", PREDICTIONS),
                "What the model predicts, for a folder's scheduler.",
                '"v"',
                otherwise="what the model says of itself",
            ),
            "tokenizer": Key(
                INSIDE,
                "A folder inside the recipe's with CLIP's `vocab.json` and `merges.txt`, or a model's "
                "tokenizers.",
                '"tokenizer"',
            ),
            "metadata": Key(
                Metadata(),
                "Strings for the file's metadata, beside and before the recipe's. Keys with dots may be "
                "written as TOML has them.",
                '{ author = "…", license = "…" }',
                default={},
            ),
            "base": Key(base, "In place of the recipe's.", '"mix"', otherwise="the recipe's"),
            "components": Key(
                picks, "In place of the recipe's, class by class.", '{ VAE-v1 = "other" }', default={}
            ),
            "fixes": Key(fixes, "In place of the recipe's.", "[]", otherwise="the recipe's"),
            "expect": Key(expect, "What must hold of this output.", "{ size = 2132626102 }"),
        },
    )
    source = Struct(
        "source",
        "[sources.NAME]",
        {
            "file": Key(
                PATH,
                "Path relative to the recipe; else found by name, size and digest in `CKPT_MODELS`.",
                '"Anything-V3.0.ckpt"',
            ),
            "sha256": Key(
                SHA256, "SHA-256 of the file: what pins it. Without it, the lock does.", '"8712e20a5d65…"'
            ),
            "size": Key(Number(1, whole=True), "Bytes of the file.", "7703807346"),
            "urls": Key(
                Array(URL, minimum=1),
                "Where to fetch it, tried in order.",
                '["hf://ckpt/anything-v3.0/Anything-V3.0.ckpt"]',
                default=(),
            ),
            "recipe": Key(PATH, "Another recipe, relative to this one, whose product it is.", '"mix.toml"'),
            "output": Key(NAME, "Which output of that recipe.", '"no-ema"', otherwise="the only one"),
        },
        any_of=("file", "sha256", "urls", "recipe"),
        excludes={"recipe": ("file", "sha256", "size", "urls")},
        needs={"output": "recipe"},
    )
    steps = StepKind(
        {f"{n}:" if o.of_methods else n: _operation(o, catalog) for n, o in words.operations.items()}
    )
    tables = (source, output, expect)
    keys = {
        "format": Key(Format(), "Version of the language.", str(FORMAT), required=True),
        "name": Key(NAME, "Name of the model and of its files.", '"anything-v3"', required=True),
        "description": Key(Text((PROSE,)), "What it is, for people.", '"Anything v3"', default=""),
        "base": base_key,
        "fixes": fixes_key,
        "sources": Key(Table("sources", WORD, source), "Checkpoints to take things from.", "{ }", default={}),
        "components": components_key,
        "arithmetic": Key(Choice("arithmetic", ARITHMETIC), "How steps compute.", '"file"', default="exact"),
        "steps": Key(Table("steps", WORD, steps), "Named intermediate models.", "{ }", default={}),
        "output": Key(
            Either((output, Array(output, minimum=1))),
            "What to write: one, or several as `[[output]]`.",
            "{ }",
        ),
        "metadata": Key(
            Metadata(),
            "Strings for the metadata of every output, as under `[output.metadata]`.",
            '{ author = "…", license = "…" }',
            default={},
        ),
        "expect": Key(expect, "What must hold of the only output.", "{ size = 2132626102 }"),
    }
    elsewhere = {k: t.heading for t in tables for k in t.keys if k not in keys}
    return Struct("recipe", "", keys, elsewhere=elsewhere)

"""Why two checkpoints differ, as far as the differences tell: in words, the most specific first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from builder.base.progress import human_bytes
from builder.base.words import counted
from builder.models.identity import EMA, Identity
from builder.operations.fixes import POSITION_IDS
from builder.reports.diff.compare import Diff, Part, Side, TensorDiff
from builder.tensors.lazy import DType

TYPES = {DType.F16: "FP16", DType.F32: "FP32", DType.F64: "FP64"}
MANTISSA = {DType.F16: 10, DType.BF16: 7, DType.F32: 23, DType.F64: 52}  # bits behind the point
EVERYWHERE = 0.9  # of a component's tensors
HAIR = 2  # units in the last place, up to which two ways of computing the same may be apart
EXAMPLES = 3
_CROSSED = (DType.F16, DType.BF16)  # neither holds all that the other does

# What a LoRA changes of a UNET or a text encoder: weights of linear layers and of 1x1 convolutions there.
_LORA = ("attn1.to_", "attn2.to_", ".ff.net.", ".proj_in.", ".proj_out.", "self_attn.", ".mlp.")


def causes(diff: Diff) -> tuple[str, ...]:
    """What explains the differences, a sentence each; the first says most."""
    if diff.same:
        return ("identical tensors" + ("" if diff.same_header else ": only the header differs"),)
    for made in (_derive(diff, "A", "B"), _derive(diff, "B", "A")):
        if made is not None:
            return (made,)
    return tuple(
        dict.fromkeys((*_strangers(diff), *_parts(diff), *_types(diff), *_alone(diff), *_names(diff)))
    )


def type_name(dtype: DType) -> str:
    """A type as people write it: `FP16`."""
    return TYPES.get(dtype, dtype.code)


def is_positions(tensor: TensorDiff) -> bool:
    """Whether this is a text encoder's `position_ids`."""
    return f".{tensor.pair.a}".endswith(f".{POSITION_IDS}")


# -- one file as what was made of the other


@dataclass
class _Way:
    """A direction: `to` is held to be what was made of `of`."""

    of: str
    to: str
    drops: list[str] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)


def _derive(diff: Diff, of: str, to: str) -> str | None:
    """The sentence that explains all differences as what became of one file; None where it does not."""
    changed = [t for t in diff.tensors if not t.alike]
    only_of, only_to = (diff.only_a, diff.only_b) if of == "A" else (diff.only_b, diff.only_a)
    added = [n for n in only_to if not f".{n}".endswith(f".{POSITION_IDS}")]
    if added or not diff.tensors or any(not is_positions(t) for t in changed):
        return None
    way = _Way(of, to)
    if not _rounded(diff.tensors, way):
        return None
    side = diff.a if of == "A" else diff.b
    alone = _dropped(diff, way, side, only_of)
    turned = [t for t in diff.tensors if is_positions(t) and (not t.alike or _unlike_kinds(t))]
    if turned or len(only_to) > len(added):
        way.turns.append("with position_ids mended" if _mended(turned, to) else "with other position_ids")
    names = list(_names(diff))
    if not names and any(t.shapes[0] != t.shapes[1] and not is_positions(t) for t in diff.tensors):
        way.turns.append("with some tensors in other shapes")
    if names and not alone:
        way.turns.append("under other names")
    if not way.drops and len(way.turns) == 1 and way.turns[0].endswith(("position_ids", "mended")):
        return "only position_ids differ: " + (_positions(turned) if turned else f"{of} has none")
    if not way.drops and way.turns == ["under other names"]:
        return "the same tensors under other names: " + ", ".join(names)
    if alone is not None:
        return ", ".join([f"{to} is {of}'s {alone} alone", *way.turns])
    words = [*way.drops, *way.turns]
    return f"{to} is {of} " + ("pruned: " if way.drops and len(words) > 1 else "") + ", ".join(words)


def _unlike_kinds(tensor: TensorDiff) -> bool:
    """Whether one side has integers where the other has not: that is no rounding."""
    return tensor.dtypes[0].floating is not tensor.dtypes[1].floating


def _mended(tensors: Sequence[TensorDiff], to: str) -> bool:
    """Whether position ids differ as the fix leaves them: where they were farthest off, they are exact."""
    for tensor in tensors:
        spot = tensor.values.largest if tensor.values else None
        dtype = tensor.dtypes[0] if to == "A" else tensor.dtypes[1]
        if dtype is not DType.I64 or (spot and (spot.a if to == "A" else spot.b) != spot.at):
            return False
    return bool(tensors)


def _rounded(tensors: Sequence[TensorDiff], way: _Way) -> bool:
    """Note to which types numbers were rounded; False where a tensor went the other way."""
    letter = way.of.lower()
    vias: dict[DType, list[set[DType | None]]] = {}
    changed: set[DType] = set()
    for tensor in tensors:
        values = tensor.values
        if values is None or not values.alike or not values.rounding or _unlike_kinds(tensor):
            continue
        mine = {r.via for r in values.rounding if r.of == letter}
        if not mine:
            return False
        dtype = tensor.dtypes[1] if letter == "a" else tensor.dtypes[0]
        vias.setdefault(dtype, []).append(mine)
        changed |= set() if tensor.exact else {dtype}
    for dtype, found in vias.items():
        common = set.intersection(*found)
        # One way that explains all of them is likelier than several.
        if None in common:
            name = type_name(dtype)
            way.turns.append(f"rounded to {name}" if dtype in changed else f"in {name}, the same values")
        else:
            via = min((type_name(v) for v in common if v), default="several types")
            way.turns.append(f"rounded to {via}, and stored as {type_name(dtype)}")
    return True


def _dropped(diff: Diff, way: _Way, side: Side, names: Sequence[str]) -> str | None:
    """Note what is gone; the class that is left when it is the only one."""
    gone = [p.cls for p in diff.parts if _only(p, way.of) and not _average(p)]
    left = [p.cls for p in diff.parts if p.cls and p.a and p.b]
    identity = side.identity
    groups = (
        ("without its EMA", (*identity.ema, *_states(identity))),
        ("without junk", identity.junk),
        ("without extras", tuple(n for n in identity.optional if n not in _states(identity))),
        ("without what nothing explains", identity.unknown),
    )
    for words, kind in groups:
        found = [n for n in names if n in set(kind)]
        if found:
            way.drops.append(f"{words} ({human_bytes(side.size(found))})")
    if gone and len(left) == 1:
        return left[0]
    way.drops += [f"without its {cls}" for cls in gone]
    positions = [n for n in names if f".{n}".endswith(f".{POSITION_IDS}")]
    if positions and not gone:
        way.drops.append("without position_ids")
    return None


def _states(identity: Identity) -> tuple[str, ...]:
    """What is kept of a running average beside its weights."""
    return tuple(n for n in identity.optional if n.startswith(EMA))


def _only(part: Part, letter: str) -> bool:
    return bool(part.cls) and not part.tensors and (part.b is None if letter == "A" else part.a is None)


def _average(part: Part) -> bool:
    return any(match.ema for match in (part.a, part.b) if match is not None)


# -- what differs, one by one


def _strangers(diff: Diff) -> Iterator[str]:
    a, b = diff.a.identity.architecture, diff.b.identity.architecture
    if not diff.tensors:
        yield "the two have no tensor in common"
    if a != b and (a or b):
        yield f"A is {a or 'unknown'}, B is {b or 'unknown'}"


def _parts(diff: Diff) -> Iterator[str]:
    told = {part.cls: _part(diff, part) for part in diff.parts if part.changed}
    promoted = dict(diff.promoted)
    first = [c for c in told if c in promoted or c in diff.a.known or c in diff.b.known]
    for cls in (*first, *(c for c in told if c not in first)):
        yield told[cls]


def _part(diff: Diff, part: Part) -> str:
    """Why the numbers of a component are others."""
    cls = part.cls or ("what belongs to no component" if len(diff.parts) > 1 else "the model")
    promoted = dict(diff.promoted).get(part.cls)
    if promoted:
        return f"{cls} of {promoted} is the EMA of {'A' if promoted == 'B' else 'B'}"
    has = [
        f"{s} has {known[part.cls]}'s"
        for s, known in (("A", diff.a.known), ("B", diff.b.known))
        if part.cls in known
    ]
    if has:
        same = diff.a.known.get(part.cls) == diff.b.known.get(part.cls)
        return f"{cls} differs" + (
            f", though either's metric is {diff.a.known[part.cls]}'s" if same else f": {', '.join(has)}"
        )
    if part.a and part.b and part.a.component.name != part.b.component.name and _shapes(part):
        return f"{cls} is {part.a.component.name} in A, {part.b.component.name} in B"
    if all(map(is_positions, part.changed)):
        return f"{cls} differs in position_ids alone: {_positions(part.changed)}"
    return f"{cls} {_how(part)}"


def _how(part: Part) -> str:
    total, changed = part.total, [t for t in part.changed if not is_positions(t)]
    numbers = [t for t in part.tensors if t.dtypes[0].floating]
    if total.not_numbers:
        return f"has NaN on one side where the other has a number: {counted(total.not_numbers, 'value')}"
    types = {t.dtypes for t in changed}
    if types <= {_CROSSED, _CROSSED[::-1]} and 100 * total.distances[1] >= 99 * sum(total.distances):
        a, b = (type_name(d) for d in next(iter(types)))
        return f"may be the same, rounded to {a} in A and to {b} in B from something finer"
    if not _shapes(part) and total.unit is not None:
        if total.steps <= HAIR:
            return f"differs by at most {total.steps} ULP: the same, computed or rounded in another way"
        if _like_lora(part, changed, numbers):
            return "differs in layers that a LoRA changes, and in no others: as if one was baked in"
        if len(changed) >= EVERYWHERE * len(numbers) and total.unit in MANTISSA and len(changed) > 1:
            return _everywhere(total.typical - MANTISSA[total.unit])
    listed = ", ".join(f"`{t.pair.bare}`" for t in changed[:EXAMPLES])
    more = f" and {len(changed) - EXAMPLES:,} more" if len(changed) > EXAMPLES else ""
    return f"differs in {len(changed):,} of {len(part.tensors):,} tensors: {listed}{more}"


def _everywhere(power: int) -> str:
    """What it means that half of the values differ by less than 2**power of themselves."""
    if power >= 0:
        return "holds other weights altogether"
    share = f"{100 * 2.0**power:.2g}"
    amounts = f"by small amounts, half of the values by less than {share}%"
    return f"differs everywhere {amounts}: a merge or a fine-tune"


def _like_lora(part: Part, changed: Sequence[TensorDiff], numbers: Sequence[TensorDiff]) -> bool:
    if not part.cls.startswith(("UNET", "CLIP")) or not changed:
        return False
    possible = [t for t in numbers if t.pair.bare.endswith("weight") and any(p in t.pair.bare for p in _LORA)]
    return len(changed) > len(possible) / 4 and {t.pair for t in changed} <= {t.pair for t in possible}


def _shapes(part: Part) -> bool:
    return any(t.values is None for t in part.tensors)


def _types(diff: Diff) -> Iterator[str]:
    """Roundings of components that nothing else has changed."""
    tensors = [t for p in diff.parts if not p.changed for t in p.tensors]
    for way in (_Way("A", "B"), _Way("B", "A")):
        if _rounded(tensors, way):
            yield from (f"apart from that, {way.to} is {way.of} {turn}" for turn in way.turns)
            return
    yield "apart from that, some components are rounded in A, some in B"


def _alone(diff: Diff) -> Iterator[str]:
    for letter, side, names in (("A", diff.a, diff.only_a), ("B", diff.b, diff.only_b)):
        identity, rest = side.identity, dict.fromkeys(names)
        whole = [p for p in diff.parts if _only(p, letter)]
        kinds = {p.cls: p.only_a if letter == "A" else p.only_b for p in whole}
        kinds |= {
            "EMA": (*identity.ema, *_states(identity)),
            "junk": identity.junk,
            "extras": identity.optional,
        }
        said = []
        for word, kind in kinds.items():
            found = [n for n in kind if n in rest]
            for name in found:
                del rest[name]
            if found:
                said.append(f"{word} ({human_bytes(side.size(found))})")
        if rest:
            said.append(f"{counted(len(rest), 'tensor')}{' more' * bool(said)}")
        if said:
            yield f"{letter} alone has {', '.join(said)}"


def _names(diff: Diff) -> Iterator[str]:
    for part in diff.parts:
        if not any(t.renamed for t in part.tensors) or part.a is None or part.b is None:
            continue
        told = False
        for letter, match in (("A", part.a), ("B", part.b)):
            if match.component.mislabelled:
                yield f"{part.cls} names are NAI's in {letter}"
                told = True
            elif match.diffusers_attention:
                yield f"{part.cls} has its attention as diffusers names it in {letter}"
                told = True
        if not told:
            a, b = (f"`{m.prefix}…`" if m.prefix else "bare names" for m in (part.a, part.b))
            yield f"{part.cls} is under {a} in A, {b} in B"


def _positions(tensors: Sequence[TensorDiff]) -> str:
    """What differs of position ids."""
    said = []
    for tensor in tensors:
        values = tensor.values
        first, second = (f"{d.code} {list(s)}" for d, s in zip(tensor.dtypes, tensor.shapes, strict=True))
        if values is None or values.largest is None:
            said.append(f"{first} in A, {second} in B")
            continue
        at, a, b = values.largest
        types = f", as {first} and {second}" if first != second else ""
        where = f"position {at} is {a:.7g} in A and {b:.7g} in B"
        said.append(f"{values.differing} of {values.elements}, {where}{types}")
    return "; ".join(said)

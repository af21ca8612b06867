"""The safetensors format: a strict reader of its header."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from builder.base.errors import Place, Problem, SourceError
from builder.base.words import counted, listed
from builder.formats.blob import Blob, BlobTensor
from builder.formats.checkpoint import Checkpoint, with_descriptions
from builder.tensors.lazy import BY_CODE, DType

METADATA = "__metadata__"
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_MAX_ENTRY = 1 << 16  # characters of one tensor's entry: bounds what a hostile list can expand to
_TOO_MANY = 1 << 63


class Entry(NamedTuple):
    """A tensor's line in the header; its bytes are `[start, end)`, counted from the header's end."""

    dtype: DType
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """What a safetensors file says of itself; tensors in the order of their bytes.

    `mended` says what of it the format does not allow, where it was read for repair.
    """

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_offset: int
    mended: tuple[str, ...] = ()


def from_blob(blob: Blob, name: str, *, repair: bool = False) -> Checkpoint:
    """The checkpoint in a safetensors file; `repair` and errors are as for `read_header`."""
    header = read_header(blob, repair=repair)
    base = header.data_offset
    checkpoint = Checkpoint(
        name=name,
        container="safetensors",
        size=blob.size,
        tensors={n: BlobTensor(e.dtype, e.shape, blob, base + e.start) for n, e in header.tensors.items()},
        metadata=header.metadata,
        blobs=(blob,),
        mended=header.mended,
    )
    return with_descriptions(checkpoint)


def read_header(blob: Blob, *, repair: bool = False) -> Header:
    """The header of a safetensors file, wholly checked.

    Tensors must tile the file from the header's end to its own end, each as long as its dtype and shape
    say. Refused beyond what the reference implementation refuses: names that come twice, names with NUL,
    and shapes whose non-zero extents overflow. Names are names only, never paths, so others may be odd.
    With `repair`, some of what is wrong is passed over and told of in `mended`, as no tensor suffers from it:
    bytes that belong to none, between them or behind the last, and metadata that are no strings, whose JSON
    is taken for one. Raises SourceError for a header that is not valid, and when it cannot be read.
    """
    odd: list[_Odd] = []
    try:
        text, data_offset = _text(blob)
        tensors, metadata = _parse(text, odd)
        tensors = _tiled(tensors, blob.size - data_offset, odd)
        if odd and not repair:
            raise _Bad(odd[0].fact, *odd[0].evidence, _all_there(len(tensors)), hint=_REPAIR)
        return Header(tensors, metadata, data_offset, tuple(o.mended for o in odd))
    except _Bad as bad:
        problem = Problem(bad.fact, Place(blob.name), bad.evidence, bad.hint)
        raise SourceError(problem) from None


class _Bad(Exception):
    """A problem that does not know its file yet."""

    def __init__(self, fact: str, *evidence: str, hint: str | None = None) -> None:
        super().__init__(fact)
        self.fact, self.evidence, self.hint = fact, evidence, hint


class _Odd(NamedTuple):
    """What the format does not allow and no tensor suffers from, and what mends it."""

    fact: str
    evidence: tuple[str, ...]
    mended: str


_REPAIR = "`ckpt convert FILE --repair -o OTHER.safetensors` writes them as a valid file"
_TRUNCATED = "the file is truncated: download or copy it again, and check its SHA-256"


def _all_there(count: int) -> str:
    few = ("there are no tensors", "its one tensor is all there")
    return few[count] if count < len(few) else f"all {count:,} tensors are there"


def _text(blob: Blob) -> tuple[str, int]:
    if blob.size < 8:
        raise _Bad("too short for a safetensors file", f"{blob.size} bytes", hint=_TRUNCATED)
    head = bytearray(8)
    blob.read_into(0, memoryview(head))
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER:  # most likely other bytes than a length, of a file of another kind: not shown
        raise _Bad("the safetensors header is too long", f"the format allows {MAX_HEADER:,} bytes")
    if 8 + length > blob.size:
        raise _Bad(
            "the safetensors header reaches past the end of the file",
            f"it would be {length:,} bytes; the file has {blob.size:,}",
            hint=_TRUNCATED,
        )
    if length < 2:
        raise _Bad("the safetensors header is empty", f"its length is given as {length}")
    raw = bytearray(length)
    blob.read_into(8, memoryview(raw))
    if raw[0] != ord("{"):
        raise _Bad("the safetensors header does not begin with `{`")
    try:
        return raw.decode("utf-8"), 8 + length
    except UnicodeDecodeError as error:
        raise _Bad(
            "the safetensors header is not UTF-8", f"{error.reason} at byte {8 + error.start:,}"
        ) from None


_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NUMBER = "(?:0|[1-9][0-9]{0,17})"
_FIELD = (
    rf'(?:"dtype": ?"(\w+)"|"shape": ?\[((?:{_NUMBER}(?:, ?{_NUMBER}){{0,15}})?)\]'
    rf'|"data_offsets": ?\[({_NUMBER}), ?({_NUMBER})\])(?:, ?(?=")|(?=\}}))'
)
_USUAL = re.compile(
    rf'"([^"\\\x00-\x1f]+)": ?\{{(?:{_FIELD}){{3}}\}}, ?(?=")'
)  # a tensor's member as programs write it, in any order, read several times faster than JSON at large


@lru_cache(1 << 10)
def _shape(extents: str) -> tuple[int, ...]:
    return tuple(map(int, extents.split(","))) if extents else ()


def _parse(text: str, odd: list[_Odd]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Member by member, so that memory is bounded by what is kept, not by what JSON can expand to."""
    tensors: dict[str, Entry] = {}
    metadata: dict[str, str] | None = None

    def add(name: str, entry: Entry) -> None:
        if name in tensors:
            raise _Bad(f"the safetensors header names tensor `{name}` twice")
        tensors[name] = entry

    more, at = _open(text, 0)
    while more:
        # Three fields without a missing one are each there once.
        while (found := _USUAL.match(text, at)) and None not in found.groups() and found[1] != METADATA:
            name, code, extents, start, end = found.groups()
            add(name, _entry(name, code, _shape(extents), int(start), int(end)))
            at = found.end()
        name, at = _key(text, at)
        if name != METADATA:
            info, at = _info(text, at, name)
            add(name, info)
        elif metadata is None:
            metadata, at = _metadata(text, at, odd)
        else:
            raise _Bad(f"the safetensors header has `{METADATA}` twice")
        more, at = _next(text, at)
    if at < len(text):
        raise _syntax(text, at, "text after the header's object")
    if half := _SURROGATE.search(text):
        try:
            "\0".join((*tensors, *(metadata or {}), *(metadata or {}).values())).encode()
        except UnicodeEncodeError:
            raise _syntax(text, half.start(), "half a character stands alone") from None
    return tensors, metadata or {}


def _metadata(text: str, at: int, odd: list[_Odd]) -> tuple[dict[str, str], int]:
    metadata: dict[str, str] = {}
    others: list[tuple[str, int]] = []
    if text.startswith("null", at):
        return metadata, at + 4
    more, at = _open(text, at)
    while more:
        key, at = _key(text, at)
        if key in metadata:
            raise _Bad(f"the metadata has `{key}` twice")
        if text[at : at + 1] == '"':
            metadata[key], at = _value(text, at)
        else:
            others.append((key, at))
            end = _end_of(text, at, key)
            metadata[key], at = text[at:end], end
        more, at = _next(text, at)
    if others:
        key, begins = others[0]
        evidence: tuple[str, ...] = (f"it begins with {text[begins : begins + 20]!r}",)
        if len(others) > 1:
            evidence += (f"nor are {len(others) - 1:,} others",)
        mended = f"metadata that were no strings are now: {listed(tuple(k for k, _ in others))}"
        odd.append(_Odd(f"metadata `{key}` is not a string", evidence, mended))
    return metadata, at


def _end_of(text: str, at: int, key: str) -> int:
    """Where the JSON value at `at` ends, which is no string and must be short."""
    try:
        return at + _short_value(text, at, _ANY)[1]
    except _Bad:
        begins = f"it begins with {text[at : at + 20]!r}"
        raise _Bad(f"metadata `{key}` is neither a string nor a short value", begins) from None


def _short_value(text: str, at: int, decoder: json.JSONDecoder) -> tuple[Any, int]:
    """The JSON value at `at` and its length, from a copy that is not much longer than the value."""
    for size in (1 << 8, 1 << 12, _MAX_ENTRY):
        try:
            value, length = _value(text[at : at + size], 0, at, decoder)
        except _Bad:
            if size == _MAX_ENTRY:
                raise
            continue
        if length < size:  # else it may be a number that goes on
            break
    return value, length


def _info(text: str, at: int, name: str) -> tuple[Entry, int]:
    if "\0" in name:
        raise _Bad(f"the tensor name `{name}` holds a NUL character")
    if text[at : at + 1] != "{" or text.find("}", at, at + _MAX_ENTRY) < 0:
        begins = f"it begins with {text[at : at + 40]!r}"
        raise _Bad(f"the entry of tensor `{name}` is not a short object", begins)
    info, length = _short_value(text, at, _DECODER)
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in info]
    if missing:
        raise _Bad(f"tensor `{name}` lacks `{'`, `'.join(missing)}`", f"its entry is {_short(info)}")
    shape, offsets = info["shape"], info["data_offsets"]
    if not _counts(shape):
        raise _Bad(f"the shape of tensor `{name}` is not a list of sizes", f"shape {_short(shape)}")
    if not _counts(offsets) or len(offsets) != 2:
        raise _Bad(f"tensor `{name}` has invalid offsets", f"data_offsets {_short(offsets)}")
    return _entry(name, info["dtype"], tuple(shape), *offsets), at + length


def _entry(name: str, code: Any, shape: tuple[int, ...], start: int, end: int) -> Entry:
    dtype = BY_CODE.get(code) if type(code) is str else None
    if dtype is None:
        raise _Bad(f"tensor `{name}` has an unknown dtype", f"dtype {_short(code)}")
    extent = _product(filter(None, shape))
    bits = 0 if 0 in shape else extent * dtype.bits
    if bits == (end - start) * 8 and extent < _TOO_MANY:
        return Entry(dtype, shape, start, end)
    given = f"{code} {_short(shape)}"
    if start > end:
        raise _Bad(f"tensor `{name}` ends before it begins", f"data_offsets {_short([start, end])}")
    if extent >= _TOO_MANY:
        raise _Bad(f"the shape of tensor `{name}` overflows", given)
    if bits % 8:
        raise _Bad(f"tensor `{name}` is not a whole number of bytes", given)
    raise _Bad(
        f"tensor `{name}` is not as long as its dtype and shape say",
        f"{given} takes {_short(bits // 8)} bytes",
        f"data_offsets {_short([start, end])} hold {end - start} bytes",
    )


def _product(sizes: Iterable[int]) -> int:
    """Their product, or any number beyond all limits: that of thousands would take long to know."""
    found = 1
    for size in sizes:
        found *= size
        if found >= _TOO_MANY:
            break
    return found


def _counts(value: Any) -> bool:
    return type(value) is list and all(type(n) is int and 0 <= n < _TOO_MANY for n in value)


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except ValueError:  # an integer too long to be shown
        text = "a number of thousands of digits"
    return text if len(text) <= 100 else text[:99] + "…"


def _tiled(tensors: dict[str, Entry], room: int, odd: list[_Odd]) -> dict[str, Entry]:
    """The tensors in the order of their bytes, which must fill `room` bytes without holes or overlaps."""
    at, last = 0, ""
    holes: list[tuple[str, int, int]] = []
    ordered = sorted(tensors.items(), key=lambda item: item[1][2:])
    for name, entry in ordered:
        if entry.start < at:
            raise _Bad(
                f"tensors `{last}` and `{name}` overlap",
                f"`{last}` ends at byte {at:,} of the data, `{name}` begins at {entry.start:,}",
            )
        if entry.start > at:
            holes.append((name, at, entry.start))
        at, last = entry.end, name
    if at > room:
        cut = counted(sum(e.end > room for e in tensors.values()), "tensor")
        have = f"they end at byte {at:,} of the data, {room:,} are there: {cut} of {len(tensors):,} cut"
        raise _Bad("the file ends before its tensors do", have, hint=_TRUNCATED)
    if holes:
        (name, start, end), *others = holes
        evidence: tuple[str, ...] = (f"bytes {start:,} to {end:,} of the data belong to no tensor",)
        too_many = counted(sum(stop - start for _, start, stop in holes), "byte")
        if others:
            evidence += (f"nor do those in {counted(len(others), 'other hole')}: {too_many} in all",)
        odd.append(_Odd(f"there is a hole before tensor `{name}`", evidence, f"{too_many} in holes left out"))
    if at < room:
        too_many = counted(room - at, "byte")
        have = f"the tensors end at byte {at:,} of the data, {room:,} are there: {too_many} too many"
        mended = f"{too_many} behind the last tensor left out"
        odd.append(_Odd("the file goes on after its last tensor", (have,), mended))
    return dict(ordered)


def _open(text: str, at: int) -> tuple[bool, int]:
    """Enter the object at `at`: whether it has members, and where the first one, or what follows, is."""
    if text[at : at + 1] != "{":
        raise _syntax(text, at, "an object is expected")
    at = _skip(text, at + 1)
    return (False, _skip(text, at + 1)) if text[at : at + 1] == "}" else (True, at)


def _key(text: str, at: int) -> tuple[str, int]:
    """A member's name, and where its value begins."""
    if text[at : at + 1] != '"':
        raise _syntax(text, at, "a name is expected")
    key, at = _value(text, at)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise _syntax(text, at, "`:` is expected")
    return key, _skip(text, at + 1)


def _next(text: str, at: int) -> tuple[bool, int]:
    """After a member: whether another one follows, and where it, or what follows the object, is."""
    at = _skip(text, at)
    mark = text[at : at + 1]
    if mark not in (",", "}"):
        raise _syntax(text, at, "`,` or `}` is expected")
    return mark == ",", _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    if text[at : at + 1] > " ":
        return at
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _value(text: str, at: int, base: int = 0, decoder: json.JSONDecoder | None = None) -> tuple[Any, int]:
    """The JSON value at `at`, and its end; `base` is where `text` itself begins, for messages."""
    try:
        return (decoder or _DECODER).raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _syntax(text, error.pos, error.msg, base) from None
    except RecursionError:
        raise _syntax(text, at, "nested too deep", base) from None
    except ValueError as error:  # a float, NaN, a key twice, or an integer of thousands of digits
        raise _syntax(text, at, str(error), base) from None


def _refused(token: str) -> NoReturn:
    raise ValueError(f"`{token[:40]}` has no place here")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members as a dict; raises ValueError when two have the same name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_float=_refused, parse_constant=_refused)
_ANY = json.JSONDecoder()


def _syntax(text: str, at: int, why: str, base: int = 0) -> _Bad:
    near = f"character {base + at:,}: {text[at : at + 40]!r}" if at < len(text) else "the end"
    return _Bad("the safetensors header is not valid JSON", f"{why}, at {near}")

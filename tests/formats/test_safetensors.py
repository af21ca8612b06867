"""The safetensors reader: what it accepts, and what it says of what it does not."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.errors import SourceError
from builder.formats.safetensors import MAX_HEADER, from_blob, read_header

Read = dict[str, tuple[str, list[int], bytes]]


class Bytes:
    """A blob in memory."""

    name = "model.safetensors"

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.data[offset : offset + len(out)]

    def close(self) -> None:
        pass


def file(header: bytes | str | dict[str, Any], data: bytes | int = b"") -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + (bytes(data) if isinstance(data, int) else data)


def entry(dtype: Any, shape: Any, start: Any, end: Any, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


A = entry("F32", [2], 0, 8)


def ours(data: bytes) -> Read:
    checkpoint = from_blob(Bytes(data), "x")
    return {n: (t.dtype.code, list(t.shape), bytes(t.tobytes())) for n, t in checkpoint.items()}


def theirs(data: bytes) -> Read:
    """The same as the reference implementation reads it; raises SafetensorError."""
    return {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in safetensors.deserialize(data)}


@pytest.mark.parametrize(
    "data",
    [
        file("{}"),
        file("{} \n\t\r  "),
        file('{"__metadata__":null}'),
        file({"a": entry("F64", [], 0, 8)}, b"12345678"),
        file({"b": entry("F32", [0], 0, 0), "a": A, "c": entry("F32", [3, 0], 8, 8)}, 8),
        file({"b": entry("U8", [3], 8, 11), "a": A}, b"12345678abc"),
        file('{ "a" : { "data_offsets" : [ 0 , 1 ] , "dtype":"U8","shape" : [ 1 ] } } ', b"x"),
        file({"a": {**A, "x": {"y": [1]}}}, 8),
        file({n: entry("U8", [0], 0, 0) for n in ("", "../../etc/passwd", "a\nb", "\x1b[31m", '"\\', "雪")}),
        file({"a": entry("F4", [2, 3], 0, 3), "b": entry("F6_E2M3", [4], 3, 6)}, b"123456"),
    ],
)
def test_what_is_accepted_is_read_as_the_reference_reads_it(data: bytes) -> None:
    assert ours(data) == theirs(data)


def test_metadata() -> None:
    assert read_header(Bytes(file({"__metadata__": {"a": "b", "é\n": ""}, "t": A}, 8))).metadata == {
        "a": "b",
        "é\n": "",
    }
    assert read_header(Bytes(file({"t": A}, 8))).metadata == {}


NO_JSON = "the safetensors header is not valid JSON"
TRUNCATED = "the file is truncated: download or copy it again, and check its SHA-256"

REFUSED: dict[str, tuple[bytes, str, tuple[str, ...]]] = {
    "nothing at all": (b"", "too short for a safetensors file", ("0 bytes",)),
    "seven bytes": (bytes(7), "too short for a safetensors file", ("7 bytes",)),
    "length 0": (bytes(20), "the safetensors header is empty", ("its length is given as 0",)),
    "length 2^63": (
        (1 << 63).to_bytes(8, "little") + b"{}",
        "the safetensors header is too long",
        ("the format allows 100,000,000 bytes",),
    ),
    "length past the end": (
        (100).to_bytes(8, "little") + b"{}",
        "the safetensors header reaches past the end of the file",
        ("it would be 100 bytes; the file has 10",),
    ),
    "a space first": (
        file(" {}"),
        "the safetensors header does not begin with `{`",
        (),
    ),
    "an array": (file("[]"), "the safetensors header does not begin with `{`", ()),
    "not UTF-8": (
        file(b'{"\xff":1}'),
        "the safetensors header is not UTF-8",
        ("invalid start byte at byte 10",),
    ),
    "cut JSON": (file('{"a":'), "the entry of tensor `a` is not a short object", ("it begins with ''",)),
    "an open object": (
        file('{"a":1'),
        "the entry of tensor `a` is not a short object",
        ("it begins with '1'",),
    ),
    "no closing": (file('{"__metadata__":{}'), NO_JSON, ("`,` or `}` is expected, at the end",)),
    "no name": (file("{1:2}"), NO_JSON, ("a name is expected, at character 1: '1:2}'",)),
    "no colon": (file('{"a" 1}'), NO_JSON, ("`:` is expected, at character 5: '1}'",)),
    "a comma too many": (
        file('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},}'),
        NO_JSON,
        ("a name is expected, at character 53: '}'",),
    ),
    "two objects": (file("{}{}"), NO_JSON, ("text after the header's object, at character 2: '{}'",)),
    "zeros as padding": (
        file(b"{}\0"),
        NO_JSON,
        ("text after the header's object, at character 2: '\\x00'",),
    ),
    "deep": (
        file('{"a":{"x":' + "[" * 50_000 + "}"),
        NO_JSON,
        ("nested too deep, at character 5: '{\"x\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[['",),
    ),
    "NaN": (
        file('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'),
        NO_JSON,
        ('`NaN` has no place here, at character 5: \'{"dtype":"U8","shape":[NaN],"data_offset\'',),
    ),
    "a fraction": (
        file('{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', 1),
        NO_JSON,
        ('`1.0` has no place here, at character 5: \'{"dtype":"U8","shape":[1.0],"data_offset\'',),
    ),
    "a field twice": (
        file('{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}', 1),
        NO_JSON,
        ('a key comes twice, at character 5: \'{"dtype":"U8","shape":[1],"shape":[1],"d\'',),
    ),
    "a tensor twice": (
        file(f'{{"a":{json.dumps(A)},"a":{json.dumps(A)}}}', 8),
        "the safetensors header names tensor `a` twice",
        (),
    ),
    "a tensor twice, escaped": (
        file(f'{{"a":{json.dumps(A)},"\\u0061":{json.dumps(A)}}}', 8),
        "the safetensors header names tensor `a` twice",
        (),
    ),
    "metadata twice": (
        file('{"__metadata__":{},"__metadata__":{}}'),
        "the safetensors header has `__metadata__` twice",
        (),
    ),
    "a metadata key twice": (file('{"__metadata__":{"a":"","a":""}}'), "the metadata has `a` twice", ()),
    "metadata of numbers": (
        file('{"__metadata__":{"a":1}}'),
        "metadata `a` is not a string",
        ("it begins with '1}}'", "there are no tensors"),
    ),
    "metadata as a list": (
        file('{"__metadata__":[]}'),
        NO_JSON,
        ("an object is expected, at character 16: '[]}'",),
    ),
    "NUL in a name": (file({"a\0b": A}, 8), "the tensor name `a\0b` holds a NUL character", ()),
    "an entry that is a list": (
        file('{"a":["F32",[2],[0,8]]}', 8),
        "the entry of tensor `a` is not a short object",
        ("it begins with '[\"F32\",[2],[0,8]]}'",),
    ),
    "no dtype": (
        file({"a": {"shape": [], "x": 1}}),
        "tensor `a` lacks `dtype`, `data_offsets`",
        ('its entry is {"shape": [], "x": 1}',),
    ),
    "an unknown dtype": (
        file({"a": entry("F31", [2], 0, 8)}, 8),
        "tensor `a` has an unknown dtype",
        ('dtype "F31"',),
    ),
    "a dtype of lists": (
        file({"a": entry([[]], [2], 0, 8)}, 8),
        "tensor `a` has an unknown dtype",
        ("dtype [[]]",),
    ),
    "a negative size": (
        file({"a": entry("U8", [-1], 0, 0)}),
        "the shape of tensor `a` is not a list of sizes",
        ("shape [-1]",),
    ),
    "a size of true": (
        file({"a": entry("U8", [True], 0, 1)}, 1),
        "the shape of tensor `a` is not a list of sizes",
        ("shape [true]",),
    ),
    "a size of 2^63": (
        file({"a": entry("U8", [1 << 63, 0], 0, 0)}),
        "the shape of tensor `a` is not a list of sizes",
        ("shape [9223372036854775808, 0]",),
    ),
    "thousands of digits": (
        file('{"a":{"dtype":"U8","shape":[' + "9" * 6000 + '],"data_offsets":[0,0]}}'),
        NO_JSON,
        (),
    ),
    "three offsets": (
        file('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0,0]}}'),
        "tensor `a` has invalid offsets",
        ("data_offsets [0, 0, 0]",),
    ),
    "an end before its begin": (
        file({"a": entry("U8", [2], 2, 0)}, 2),
        "tensor `a` ends before it begins",
        ("data_offsets [2, 0]",),
    ),
    "too few bytes": (
        file({"a": entry("F32", [2, 3], 0, 12)}, 12),
        "tensor `a` is not as long as its dtype and shape say",
        ("F32 [2, 3] takes 24 bytes", "data_offsets [0, 12] hold 12 bytes"),
    ),
    "a product over 2^64": (
        file({"a": entry("F32", [1 << 32, 1 << 32], 0, 0)}),
        "the shape of tensor `a` overflows",
        ("F32 [4294967296, 4294967296]",),
    ),
    "an overflow hidden by a 0": (
        file({"a": entry("F32", [1 << 32, 1 << 32, 0], 0, 0)}),
        "the shape of tensor `a` overflows",
        ("F32 [4294967296, 4294967296, 0]",),
    ),
    "half a byte": (
        file({"a": entry("F4", [3], 0, 1)}, 1),
        "tensor `a` is not a whole number of bytes",
        ("F4 [3]",),
    ),
    "a hole": (
        file({"a": A, "b": entry("U8", [1], 9, 10)}, 10),
        "there is a hole before tensor `b`",
        ("bytes 8 to 9 of the data belong to no tensor", "all 2 tensors are there"),
    ),
    "a hole at the start": (
        file({"b": entry("U8", [1], 1000, 1001)}, 1001),
        "there is a hole before tensor `b`",
        ("bytes 0 to 1,000 of the data belong to no tensor", "its one tensor is all there"),
    ),
    "an overlap": (
        file({"a": A, "b": entry("U8", [4], 7, 11)}, 11),
        "tensors `a` and `b` overlap",
        ("`a` ends at byte 8 of the data, `b` begins at 7",),
    ),
    "the same bytes twice": (
        file({"a": A, "b": A}, 8),
        "tensors `a` and `b` overlap",
        ("`a` ends at byte 8 of the data, `b` begins at 0",),
    ),
    "a cut file": (
        file({"a": A}, 7),
        "the file ends before its tensors do",
        ("they end at byte 8 of the data, 7 are there: 1 tensor of 1 cut",),
    ),
    "trailing bytes": (
        file({"a": A}, 9),
        "the file goes on after its last tensor",
        (
            "the tensors end at byte 8 of the data, 9 are there: 1 byte too many",
            "its one tensor is all there",
        ),
    ),
}


B = entry("U8", [1], 9, 10)
ODD: dict[str, tuple[bytes, tuple[str, ...], dict[str, str]]] = {
    "a tail": (file({"a": A}, 11), ("3 bytes behind the last tensor left out",), {}),
    "a hole": (file({"a": A, "b": B}, 10), ("1 byte in holes left out",), {}),
    "metadata": (
        file(
            '{"__metadata__":{"a":1.50,"b":"x","c":{"d":[true, null]},"e":NaN},"a":' + json.dumps(A) + "}", 8
        ),
        ("metadata that were no strings are now: `a`, `c`, `e`",),
        {"a": "1.50", "b": "x", "c": '{"d":[true, null]}', "e": "NaN"},
    ),
    "all of it": (
        file({"__metadata__": {"n": 5}, "a": A, "b": B, "c": entry("U8", [1], 12, 13)}, 20),
        (
            "metadata that were no strings are now: `n`",
            "3 bytes in holes left out",
            "7 bytes behind the last tensor left out",
        ),
        {"n": "5"},
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_no_tensor_suffers_from_is_mended(case: str) -> None:
    data, mended, metadata = ODD[case]
    header = read_header(Bytes(data), repair=True)
    assert (header.mended, header.metadata) == (mended, metadata)
    assert header.tensors["a"] == read_header(Bytes(file({"a": A}, 8))).tensors["a"]
    with pytest.raises(SourceError) as caught:
        read_header(Bytes(data))
    assert caught.value.problems[0].hint == (
        "`ckpt convert FILE --repair -o OTHER.safetensors` writes them as a valid file"
    )


@pytest.mark.parametrize("case", [c for c in REFUSED if c not in {"metadata of numbers", "trailing bytes"}])
def test_repair_takes_nothing_that_a_tensor_suffers_from(case: str) -> None:
    data, fact, _ = REFUSED[case]
    if case.startswith("a hole"):
        assert read_header(Bytes(data), repair=True).mended
        return
    with pytest.raises(SourceError) as caught:
        read_header(Bytes(data), repair=True)
    assert caught.value.problems[0].fact == fact


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "[" + "0," * 50_000 + "0]", "[", "wrong"])
def test_repair_is_bounded(value: str) -> None:
    """JSON takes thirty times its size in memory, so only short values are read."""
    with pytest.raises(SourceError) as caught:
        read_header(Bytes(file('{"__metadata__":{"a":' + value + "}}")), repair=True)
    assert caught.value.problems[0].fact == "metadata `a` is neither a string nor a short value"


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    data, fact, evidence = REFUSED[case]
    with pytest.raises(SourceError) as caught:
        read_header(Bytes(data))
    problem = caught.value.problems[0]
    assert problem.fact == fact
    assert problem.evidence == evidence or not evidence
    assert problem.place is not None
    assert problem.place.path == "model.safetensors"
    assert (problem.hint == TRUNCATED) == (
        "file ends before" in fact or "past the end" in fact or "too short" in fact
    )


VALID = file(
    {
        "__metadata__": {"format": "pt", "note": 'é \\ "'},
        "model.a": entry("F16", [2, 3], 0, 12),
        "model.b": entry("I64", [], 12, 20),
        "c\n": entry("F4", [2], 20, 21),
        "empty": entry("F32", [0, 7], 21, 21),
    },
    b"0123456789abcdefghijk",
)
HOSTILE = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"0",
    b"-1",
    b"1e9",
    b"null",
    b"\\",
    b"\0",
    b"\xc3",
    b"\\u0061",
]


@settings(max_examples=1500)
@given(st.randoms(use_true_random=False))
def test_a_damaged_file_is_read_alike_or_refused(rng: random.Random) -> None:
    """Whatever is accepted, the reference implementation accepts, and reads the same."""
    data = bytearray(VALID)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(8 if rng.random() < 0.9 else 0, len(data) + 1)
        length = rng.choice([0, 0, 1, 1, 2, 8])
        other = rng.randrange(8, len(VALID))
        new = rng.choice([rng.choice(HOSTILE), rng.randbytes(1), VALID[other : other + rng.randint(1, 30)]])
        data[at : at + length] = new
    if rng.random() < 0.8:  # keep the header's length right, to get past that check
        end = data.rfind(b"0123") if b"0123" in data else len(data)
        data[:8] = (max(0, end - 8)).to_bytes(8, "little")
    try:
        found = ours(bytes(data))
    except SourceError:
        return
    assert found == theirs(bytes(data))


@settings(max_examples=300)
@given(st.integers(0, len(VALID) - 1))
def test_a_cut_file_is_refused(length: int) -> None:
    with pytest.raises(SourceError):
        read_header(Bytes(VALID[:length]))


@pytest.mark.parametrize(
    "unit",
    ['{"a":{"dtype":[%s', '{"a":{"x":[%s', '{"a":[%s', '{"__metadata__":{"a":[%s', '{"__metadata__":[%s'],
)
@pytest.mark.parametrize("filling", ["{},", "[],", "1234567,", "1.5,", '"ab",', "[[[[[[[["])
def test_memory_is_bounded_by_what_the_header_is_not_by_what_it_means(unit: str, filling: str) -> None:
    size = 4_000_000
    data = file(unit % (filling * (size // len(filling))))
    tracemalloc.start()
    try:
        with pytest.raises(SourceError):
            read_header(Bytes(data))
        assert tracemalloc.get_traced_memory()[1] < 3 * size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("extents", ["1," * 1_000_000 + "1", "9," * 1_000_000 + "9"])
def test_a_shape_without_end_is_refused_before_it_is_multiplied(extents: str) -> None:
    header = f'{{"a":{{"dtype":"U8","shape":[{extents}],"data_offsets":[0,1]}},"b":{json.dumps(A)}}}'
    with pytest.raises(SourceError) as caught:
        read_header(Bytes(file(header, 1)))
    assert caught.value.problems[0].fact == "the entry of tensor `a` is not a short object"


@pytest.mark.parametrize("count", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_tensors(count: int) -> None:
    header = ",".join(
        f'"{n:x}":{{"dtype":"U8","shape":[1],"data_offsets":[{n},{n + 1}]}}' for n in range(count)
    )
    assert len(header) < MAX_HEADER
    found = read_header(Bytes(file("{" + header + "}", count)))
    assert len(found.tensors) == count
    assert found.tensors[f"{count - 1:x}"][2:] == (count - 1, count)

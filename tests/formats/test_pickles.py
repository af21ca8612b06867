"""The interpreter of pickles: every opcode, every spelling of a name, every limit."""

from __future__ import annotations

import argparse
import collections
import datetime
import math
import pathlib
import pickle
import pickletools
import re
import struct
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.errors import SourceError
from builder.formats.torch.pickles import Dict, Global, Malformed, Object, Skipped, Unpickled, load, machine
from builder.formats.torch.pickles.opcodes import TABLE
from builder.formats.torch.pickles.policy import holds_code


class Bytes:
    """Bytes as a blob."""

    name = "test"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read_into(self, offset: int, out: memoryview) -> None:
        assert 0 <= offset <= offset + len(out) <= self.size
        out[:] = self.data[offset : offset + len(out)]

    def close(self) -> None:
        pass


def read(data: bytes, start: int = 0, **kinds: Any) -> Unpickled:
    return load(Bytes(data), start, file="file", part="data.pkl", **kinds)


def fact(data: bytes) -> str:
    with pytest.raises(SourceError) as caught:
        read(data)
    (problem,) = caught.value.problems
    return problem.fact


def plain(value: object) -> object:
    """What Python's unpickler would have made of an interpreted value."""
    match value:
        case Dict():
            return {plain(k): plain(v) for k, v in value.pairs()}
        case list() | tuple():
            return type(value)(plain(v) for v in value)
        case Object(name="builtins.set", items=list() as items):
            return {plain(v) for v in items}
        case Object(name="builtins.frozenset", items=list() as items):
            return frozenset(plain(v) for v in items)
    return value


# Codes.


def test_every_opcode_of_the_language_is_known() -> None:
    unknown = TABLE[0]
    known = {code for code in range(256) if TABLE[code] is not unknown}
    assert known == {ord(o.code) for o in pickletools.opcodes}


keys = st.one_of(st.text(), st.integers(), st.booleans(), st.binary(), st.none())
scalars = st.one_of(keys, st.floats(allow_nan=False))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(keys, inner),
        st.sets(keys),
        st.frozensets(keys),
        st.dictionaries(st.text(), inner).map(collections.OrderedDict),
    ),
    max_leaves=30,
)


@settings(max_examples=200)
@given(values, st.integers(0, 5))
def test_plain_values_are_what_python_reads(value: object, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    found = read(data)
    assert plain(found.value) == value
    assert found.end == len(data)


@settings(max_examples=100)
@given(st.lists(values, min_size=1, max_size=4), st.integers(0, 5), st.binary(max_size=20))
def test_pickles_in_a_row_end_where_they_end(parts: list[object], protocol: int, rest: bytes) -> None:
    data = b"".join(pickle.dumps(p, protocol) for p in parts) + rest
    at = 0
    for part in parts:
        found = read(data, at)
        assert plain(found.value) == part
        at = found.end
    assert data[at:] == rest


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"I00\n.", False),
        (b"I01\n.", True),
        (b"I-7\n.", -7),
        (b"L9L\n.", 9),
        (b"F1e3\n.", 1000.0),
        (b"\x8b\x02\x00\x00\x00\xff\x7f.", 32767),
        (b"S'a\\'b\\x41\\n\\101'\n.", "a'bA\nA"),
        (b"T\x02\x00\x00\x00\xff\xfe.", b"\xff\xfe"),
        (b"U\x02hi.", "hi"),
        (b"V\\u00e9\n.", "é"),
        (b"V\\ud800\n.", "\\ud800"),
        (b"X\x03\x00\x00\x00\xed\xa0\x80.", "\\xed\\xa0\\x80"),
        (b"\x8d\x01\x00\x00\x00\x00\x00\x00\x00a.", "a"),
        (b"\x96\x01\x00\x00\x00\x00\x00\x00\x00a.", b"a"),
        (b"(I1\nI2\nt.", (1, 2)),
        (b"(I1\nl.", [1]),
        (b"(lI1\na.", [1]),
        (b"(I1\nI2\nd.", {1: 2}),
        (b"(dI1\nI2\ns.", {1: 2}),
        (b"K\x01K\x020.", 1),
        (b"K\x01(K\x021.", 1),
        (b"K\x01(0.", 1),
        (b"K\x012\x86.", (1, 1)),
        (b"K\x05p3\n0g3\n.", 5),
        (b"K\x05r\xff\xff\xff\xff0j\xff\xff\xff\xff.", 5),
        (b"K\x05\x940h\x00.", 5),
        (b"G\x3f\xf0\x00\x00\x00\x00\x00\x00.", 1.0),
    ],
)
def test_opcodes_that_python_no_longer_writes(data: bytes, value: object) -> None:
    found = plain(read(data).value)
    assert found == value
    assert type(found) is type(value)


def test_values_across_the_edge_of_the_window() -> None:
    texts = [f"{i}" * 1000 for i in range(3000)]
    for protocol in range(6):
        assert read(pickle.dumps(texts, protocol)).value == texts


@pytest.mark.parametrize(("value", "kind"), [("x" * (3 << 20), "str"), (b"x" * (3 << 20), "bytes")])
def test_a_huge_string_is_stepped_over(value: object, kind: str) -> None:
    found = read(pickle.dumps([value, 7], 4)).value
    assert found == [Skipped(kind, 3 << 20), 7]


def test_objects_stay_inert_and_keep_what_they_hold() -> None:
    found = read(pickle.dumps(argparse.Namespace(lr=0.1, layers=[1, 2]))).value
    assert isinstance(found, Object)
    assert (found.name, found.args) == ("argparse.Namespace", ())
    assert plain(found.state) == {"lr": 0.1, "layers": [1, 2]}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(a=1),
        datetime.datetime(2022, 10, 6, tzinfo=datetime.timezone.utc),
        pathlib.PurePosixPath("a/b"),
        collections.defaultdict(list, {"a": [1]}),
        collections.Counter("aab"),
        collections.deque([1, 2]),
        np.float64(0.5),
        np.arange(3),
        np.dtype("f4"),
        complex(1, 2),
        range(3),
        bytearray(b"ab"),
        {1, 2},
        slice(1, 2),
        OSError("x"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_checkpoints_hold_beside_tensors(value: object, protocol: int) -> None:
    if isinstance(value, OSError):
        assert "`builtins.OSError`" in fact(pickle.dumps(value, 4))
    else:
        assert read(pickle.dumps([value, 5], protocol)).value[1] == 5  # type: ignore[index]


def test_an_ordered_dict_as_python_2_spelt_it() -> None:
    pairs = b"(lp0\n(lp1\nS'a'\naI1\naa(lp2\nS'b'\naI2\naa"
    assert plain(read(b"ccollections\nOrderedDict\n(" + pairs + b"tR.").value) == {"a": 1, "b": 2}


def test_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.__import__", lambda *_: pytest.fail("imported"))
    found = read(b"cno.such.module\nThing\nK\x01\x85R.").value
    assert isinstance(found, Object)
    assert (found.name, found.args) == ("no.such.module.Thing", (1,))


def test_globals_are_reported() -> None:
    data = b"\x80\x04\x8c\x01a\x8c\x01B\x93)\x81ccollections\nOrderedDict\n)R\x86."
    assert read(data).globals == {"a.B", "collections.OrderedDict"}


# Code.

SPELLINGS = {
    "GLOBAL": lambda m, n: b"c%b\n%b\n)R." % (m, n),
    "INST": lambda m, n: b"(i%b\n%b\n." % (m, n),
    "OBJ": lambda m, n: b"(c%b\n%b\no." % (m, n),
    "STACK_GLOBAL": lambda m, n: b"\x8c%c%b\x8c%c%b\x93)R." % (len(m), m, len(n), n),
    "memo": lambda m, n: b"\x8c%c%b\x940\x8c%c%b\x940h\x00h\x01\x93)R." % (len(m), m, len(n), n),
    "unused": lambda m, n: b"c%b\n%b\n0N." % (m, n),
    "then malformed": lambda m, n: b"c%b\n%b\n)R\xff" % (m, n),
}
CODE = """
os system|posix system|nt system|os execv|subprocess Popen|subprocess check_output|builtins eval
builtins exec|builtins compile|builtins __import__|builtins getattr|builtins open|builtins map
builtins print|__builtin__ eval|__builtin__ file|__builtin__ apply|runpy run_path
socket create_connection|shutil rmtree|importlib import_module|ctypes CDLL|pty spawn|webbrowser open
operator attrgetter|_operator methodcaller|pickle loads|_pickle loads|cPickle loads|marshal loads
types CodeType|types FunctionType|code InteractiveInterpreter|pdb run|timeit timeit|codecs open|io open
_io FileIO|tempfile mktemp|glob glob|multiprocessing.util spawnv_passfds|asyncio run
urllib.request urlopen|http.client HTTPSConnection|requests get|requests.api get|httpx get
aiohttp.client X|torch.hub load|torch load|torch.serialization load|torch.storage _load_from_bytes
torch.jit load|torch.jit.unsupported_tensor_ops execWrapper|torch._inductor.codecache X
torch.utils.cpp_extension load|torch.fx.graph_module reduce_graph_module|torch.package PackageImporter
numpy load|numpy.f2py compile|numpy.testing._private.utils runstring|numpy.lib.npyio load
pandas read_pickle|pandas.io.pickle read_pickle|joblib load|dill loads
cloudpickle.cloudpickle _fill_function|sympy.parsing.sympy_parser parse_expr|IPython.core.getipython X
setuptools X|distutils.core setup|commands getoutput|collections namedtuple|functools reduce
copyreg add_extension|torch.serialization os.system|torch os.system|any.module os.popen
any.module sys.modules|harmless.thing eval|harmless __class__.__base__|collections OrderedDict.__init__
argparse Namespace.__init__.__globals__|typing get_type_hints|logging config.listen|_codecs decode
bdb Bdb.run|linecache getline|ensurepip bootstrap|venv create|zipimport zipimporter|gc get_objects
harmless.os system|torch.utils.data.datapipes.utils.decoder basichandlers|huggingface_hub X|torch.ops X
"""
NAMES = [tuple(pair.split()) for line in CODE.strip().splitlines() for pair in line.split("|")]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_that_only_code_needs_are_refused(spelling: str) -> None:
    for module, name in NAMES:
        data = SPELLINGS[spelling](module.encode(), name.encode())
        assert fact(data) == f"the file holds code: its pickle refers to `{module}.{name}`"


def test_all_such_names_are_named_with_the_place_of_the_first() -> None:
    data = b"N0cos\nsystem\n0ctorch\nFloatStorage\n0cbuiltins\neval\n0cos\nsystem\n."
    with pytest.raises(SourceError) as caught:
        read(b"....." + data, 5)
    (problem,) = caught.value.problems
    assert problem.fact == "the file holds code: its pickle refers to `os.system`, `builtins.eval`"
    assert problem.evidence == ("first at byte 2 of `data.pkl`", "nothing was imported or run")


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, ("touch ran",)


def test_a_working_attack_does_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Payload())
    assert "posix.system" in fact(data) or "nt.system" in fact(data)
    assert not list(tmp_path.iterdir())
    pickle.loads(data)
    assert list(tmp_path.iterdir()), "the attack would not have worked anyway"


PLAIN = """
torch FloatStorage|torch.storage UntypedStorage|torch._utils _rebuild_tensor_v2
torch.nn.parameter Parameter|collections OrderedDict|collections defaultdict|numpy.core.multiarray scalar
numpy dtype|_codecs encode|numpy._core.multiarray _reconstruct|numpy ndarray
numpy.random._pickle __randomstate_ctor|pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint
omegaconf.dictconfig DictConfig|typing Any|omegaconf.base ContainerMetadata|argparse Namespace
builtins set|builtins dict|pathlib PosixPath|__main__ Config|ldm.modules.ema LitEma|torch float16
torch.serialization _get_layout|torch.optim.adamw AdamW|copyreg _reconstructor
torch.nn.modules.container Sequential|torch.nn.modules.conv Conv2d|copy_reg _reconstructor
__builtin__ object|diffusers.models.unet UNet|transformers.models.clip.modeling_clip CLIPTextModel
torch.ao.quantization X|torch.distributed._shard X|torch.optim.lr_scheduler LambdaLR
torchvision.transforms.transforms Compose
"""


def test_names_that_checkpoints_refer_to_are_no_code() -> None:
    names = [pair.split() for line in PLAIN.strip().splitlines() for pair in line.split("|")]
    assert [n for n in names if holds_code(*n)] == []


# Limits.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it ends in the middle"),
        (b"K", "it ends in the middle"),
        (b"K\x01", "it ends in the middle"),
        (b"\x80\x06.", "protocol 6 is not known"),
        (b"\x00", "byte 0x00 is not an opcode"),
        (b".", "it ends without a value"),
        (b"N(.", "it ends without a value"),
        (b"0", "it goes back to a mark that is not there"),
        (b"2", "it takes more from its stack than is there"),
        (b"(o", "it takes more from its stack than is there"),
        (b"t", "it goes back to a mark that is not there"),
        (b"h\x00", "it recalls memo 0, which was never set"),
        (b"j\xff\xff\xff\x7f", "it recalls memo 2147483647, which was never set"),
        (b"g-1\n", "it recalls memo -1, which was never set"),
        (b"\x8b\xff\xff\xff\x7f", "an integer has 2,147,483,647 bytes"),
        (b"\x8b\xff\xff\xff\xff", "an integer has -1 bytes"),
        (b"T\xff\xff\xff\xff", "a string has -1 bytes"),
        (b"L" + b"9" * 5000 + b"L\n.", "an integer has 5,000 digits"),
        (b"I" + b"9" * 5000 + b"\n.", "an integer has 5,000 digits"),
        (b"Ione\n.", "an integer's digits are none"),
        (b"Fone\n.", "a number's digits are none"),
        (b"I1", "a line of it has no end"),
        (b"S'a\n.", "a string has no quotes"),
        (b"V\\u12\n.", "a string's escapes are wrong"),
        (b"X\xff\xff\xff\xffab.", "a string of 4,294,967,295 bytes goes past its end"),
        (b"\x8e" + b"\xff" * 8 + b".", "a string of 18,446,744,073,709,551,615 bytes goes past its end"),
        (b"\x8d" + b"\0" * 7 + b"\x80.", "a string of 9,223,372,036,854,775,808 bytes goes past its end"),
        (b"\x95" + b"\xff" * 8 + b"N.", "a frame of 18,446,744,073,709,551,615 bytes goes past its end"),
        (b"\x82\x01.", "it refers to a registry of extensions, which only its writer has"),
        (b"\x97.", "it refers to buffers, which only its writer had"),
        (b"Q", "it takes more from its stack than is there"),
        (b"K\x01Q.", "it refers to something outside itself"),
        (b"P1\n.", "it refers to something outside itself"),
        (b"K\x01K\x02\x93.", "a global's name is not a string"),
        (b"c" + b"a" * 2000 + b"\nb\n.", "it refers to names that are too long or too many"),
        (b"ca\nb\nNR.", "a call's arguments are not a tuple"),
        (b"ca\nb\n)N\x92.", "a call's named arguments are not a dict"),
        (b"K\x01}b.", "it sets attributes of what has none"),
        (b"ca\nb\n}b.", "it sets attributes of what has none"),
        (b"K\x01N" + b"a.", "it adds items to what is no list"),
        (b"}Na.", "it adds items to what is no list"),
        (b"]NNs.", "it sets keys of what is no dict"),
        (b"}(Nu.", "a dict's last key has no value"),
        (b"(Nd.", "a dict's last key has no value"),
        (b"ccollections\nOrderedDict\n](Ne\x85R.", "a dict is made of what are no pairs"),
        (b"ccollections\nOrderedDict\nK\x01\x85R.", "a dict is made of what are no pairs"),
        (b"cbuiltins\nlist\nK\x01\x85R.", "a list is made of what is none"),
        (b"c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1\x86R.", "bytes are spelt"),
    ],
)
def test_malformed_pickles_are_refused(data: bytes, message: str) -> None:
    assert fact(data).startswith(f"the pickle `data.pkl` is malformed: {message}")


def test_a_pickle_cut_anywhere_is_refused() -> None:
    value = {
        "a": [1, 2.5, None, True, -3, 1 << 70],
        "b": ("x" * 300, b"y", {1}),
        3: collections.OrderedDict(c=1),
    }
    for protocol in range(6):
        data = pickle.dumps(value, protocol)
        for size in range(len(data)):
            assert "is malformed" in fact(data[:size])


@pytest.mark.parametrize(
    "data",
    [
        b"]" * 500_000 + b"a" * 499_999 + b".",
        b")" + b"\x85" * 500_000 + b".",
        b"}" + b"N}" * 500_000 + b"s" * 500_000 + b".",
        b"ca\nb\n)R" + b"ca\nb\n)R" * 100_000 + b"b" * 100_000 + b".",
        b"N" + b"2\x86" * 500_000 + b".",
    ],
    ids=["lists", "tuples", "dicts", "objects", "doubled"],
)
def test_half_a_million_deep_nesting_is_read_and_let_go(data: bytes) -> None:
    assert read(data).end == len(data)


def test_open_marks_are_limited() -> None:
    assert "nested more than 100,000 deep" in fact(b"(" * 200_000)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"](" + b"\x8f" * 700_000 + b"e.", "lists, dicts and objects"),
        (b"ca\nb\n(" + b"ca\nb\n)R" * 700_000 + b"t.", "lists, dicts and objects"),
        (b"N" + b"\x94" * 700_000 + b".", "memos"),
        (b"](" + (b"X" + struct.pack("<I", 60_000) + b"a" * 60_000) * 600 + b"e.", "bytes"),
    ],
    ids=["sets", "calls", "memos", "strings"],
)
def test_values_are_limited(data: bytes, what: str) -> None:
    assert re.search(f"(has|have) more than [0-9,]+ {what}", fact(data))


def test_long_strings_are_counted_and_not_kept() -> None:
    text = b"X" + struct.pack("<I", 70_000) + b"a" * 70_000
    value = read(b"](" + text * 1000 + b"e.").value
    assert value == [Skipped("str", 70_000)] * 1000


def test_opcodes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.formats.torch.pickles.MAX_OPCODES", 1000)
    read(b"N0" * 499 + b"N.")
    assert "more than 1,000 opcodes" in fact(b"N0" * 500 + b"N.")


def test_names_are_limited() -> None:
    data = b"".join(b"cx\ny%d\n0" % i for i in range(machine.MAX_GLOBALS + 1))
    assert "too long or too many" in fact(data + b"N.")


@pytest.mark.parametrize("name", [b"list", b"tuple", b"dict", b"set"])
def test_copies_of_copies_are_limited(name: bytes) -> None:
    big = b"}(" + b"NN" * 100_000 + b"u" if name == b"dict" else b"](" + b"N" * 100_000 + b"e"
    copy = b"h\x00h\x01\x85R0"
    data = b"cbuiltins\n" + name + b"\n\x940" + big + b"\x940" + copy * 1000 + b"N."
    assert "copies of copies" in fact(data)


def test_a_string_encoded_again_and_again_is_limited() -> None:
    text = b"X" + struct.pack("<I", 60_000) + b"a" * 60_000
    data = b"c_codecs\nencode\n\x940" + text + b"\x8c\x06latin1\x86\x940" + b"h\x00h\x01R0" * 2000 + b"N."
    assert "copies of copies" in fact(data)


def test_a_value_may_hold_itself() -> None:
    value: list[object] = [1]
    value.append(value)
    found = read(pickle.dumps(value)).value
    assert isinstance(found, list)
    assert found[1] is found


@pytest.mark.parametrize("key", [[1], {}, (1, [2]), {1: 2}])
def test_keys_that_python_could_not_hash(key: object) -> None:
    data = pickle.dumps({}, 2)[:-1] + pickle.dumps(key, 2)[2:-1] + b"K\x01s."
    found = read(data).value
    assert isinstance(found, Dict)
    assert (plain(found[0]), found[1]) == (key, 1)


def test_keys_that_take_ages_to_hash() -> None:
    assert isinstance(read(b"}N" + b"2\x86" * 200 + b"Ns.").value, Dict)


def test_nan_and_infinity_are_numbers() -> None:
    found = read(pickle.dumps([math.nan, math.inf], 0)).value
    assert isinstance(found, list)
    assert math.isnan(found[0])
    assert found[1] == math.inf


def test_a_persistent_id_is_handed_on() -> None:
    def outside(key: object) -> object:
        if key == 1:
            return "one"
        raise Malformed("not one")

    assert read(b"K\x01Q.", persistent=outside).value == "one"
    assert read(b"Pa\n.", persistent=lambda key: key).value == "a"
    with pytest.raises(SourceError, match="not one"):
        read(b"K\x02Q.", persistent=outside)


def test_builders_make_values() -> None:
    found = read(b"cx\ny\nK\x01K\x02\x86R.", builders={"x.y": lambda args: len(args)})
    assert (found.value, found.globals) == (2, {"x.y"})


def test_a_name_alone_is_a_stub() -> None:
    found = read(b"cx\ny.z\n.").value
    assert isinstance(found, Global)
    assert (found.module, found.qualname) == ("x", "y.z")


def test_the_standard_library_is_code_unless_it_is_data() -> None:
    assert all(holds_code(m, "anything") for m in sys.stdlib_module_names)

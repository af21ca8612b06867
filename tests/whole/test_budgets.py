"""Every reader refuses, or reads, any input in time and memory that its size allows."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.help.budgets import MB, Reader, archive, header, model, repeated, tar, views
from tests.help.gguf_files import info, key, raw, text

SECONDS = 5
MEMORY = 500 << 20
LARGEST = 10 << 20  # bytes of an input

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own account")

Make = Callable[[], "bytes | str | dict[str, bytes | str]"]

CASES: dict[str, tuple[str, Make]] = {}


def case(reader: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        CASES[make.__name__] = reader, make
        return make

    return register


# Zip archives.


@case("model")
def zip_whose_last_two_records_have_one_name() -> bytes:
    return archive([(str(n), b"") for n in range(65_534)] + [("x", b""), ("x", b"")])


@case("model")
def zip_of_many_records_that_are_not_used() -> bytes:
    return archive([("data.pkl", b"\x80\x02}.")] + [(f"{n:x}", b"") for n in range(90_000)])


@case("model")
def deflated_storage_seen_transposed() -> bytes:
    side = 4096
    return model(views(side * side * 4, [(0, (side, side), (1, side))]), bytes(side * side * 4), deflate=True)


@case("model")
def deflated_storage_of_many_transposed_views() -> bytes:
    side = 1 << 11
    each = [(i, (side, side - 1), (1, side)) for i in range(8)]
    return model(views(side * side, each), bytes(side * side), deflate=True)


@case("model")
def deflated_storage_whose_end_is_seen_often() -> bytes:
    size = 64 * MB
    return model(views(size, [(size - 1 - n, (1,), (1,)) for n in range(2000)]), bytes(size), deflate=True)


@case("model")
def tensors_of_one_storage() -> bytes:
    return model(views(400_000, [(n * 4, (2, 2), (2, 1)) for n in range(100_000)]), bytes(400_000))


@case("model")
def views_that_reach_far() -> bytes:
    size, far = 5 * MB, 70_000
    return model(views(size, [(n, (size // far - 1,), (far,)) for n in range(60_000)]), bytes(size))


@case("model")
def views_that_overlap_themselves() -> bytes:
    size = 9 * MB
    return model(views(size, [(0, (2,) * 22, (400_000,) * 22)]), bytes(size))


# Pickles.


def _pickle(opcodes: bytes, *, deflate: bool = False) -> bytes:
    return model(b"\x80\x02" + opcodes, deflate=deflate)


@case("model")
def pickle_of_four_million_sets() -> bytes:
    return _pickle(b"\x8f" * 3_999_000 + b".", deflate=True)


@case("model")
def pickle_of_sets_in_a_list() -> bytes:
    return _pickle(b"](" + b"\x8f" * 599_990 + b"e.")


@case("model")
def pickle_of_dicts_in_a_list() -> bytes:
    return _pickle(b"](" + b"}" * 599_990 + b"e.")


@case("model")
def pickle_of_nested_tuples() -> bytes:
    return _pickle(b")" + b"\x85" * 599_990 + b".")


@case("model")
def pickle_of_one_list_met_often() -> bytes:
    return _pickle(b"](]" + b"2" * 3_999_000 + b"e.")


@case("model")
def pickle_of_copies() -> bytes:
    many = b"](]" + b"2" * 900_000 + b"eq\0"
    copies = b"(" + b"cbuiltins\nlist\nh\0\x85R" * 35 + b"t"
    return _pickle(many + b"0" + copies + b".")


@case("model")
def pickle_of_memos() -> bytes:
    return _pickle(b"N" + b"\x94" * 599_990 + b".")


@case("model")
def pickle_of_numbers() -> bytes:
    return _pickle(b"](" + b"J\xff\xff\xff\x3f" * 2_000_000 + b"e.")


@case("model")
def pickle_of_calls() -> bytes:
    return _pickle(b"](cx\ny\nq\0" + b"h\0)R" * 599_990 + b"e.")


@case("model")
def pickle_of_states() -> bytes:
    return _pickle(b"cx\ny\n)R" + b"Nb" * 1_990_000 + b".")


@case("model")
def pickle_of_one_tensor_met_often() -> bytes:
    inner = views(1, [(0, (1,), (1,))])[2:-1]
    return model(b"\x80\x02](" + inner + b"2" * 250_000 + b"e.", b"1")


@case("model")
def pickle_of_long_lines() -> bytes:
    return _pickle((b"S'" + b"\\x41" * (MB // 4 - 2) + b"'\n0") * 70 + b"N.", deflate=True)


@case("model")
def pickle_of_lines_kept() -> bytes:
    return _pickle(b"](" + (b"S'" + b"\\x41" * (MB // 4 - 2) + b"'\n") * 9 + b"e.")


@case("model")
def pickle_of_wide_strings() -> bytes:
    return _pickle(b"](" + (b"X\0\0\x10\0" + b"\xf0\x9f\x98\x80" * (MB // 4)) * 70 + b"e.", deflate=True)


@case("model")
def pickle_of_long_numbers() -> bytes:
    return _pickle(b"](" + (b"I" + b"7" * 990 + b"\n") * 10_000 + b"e.")


@case("model")
def pickle_of_deep_tensors() -> bytes:
    inner = views(4, [(0, (4,), (1,))])[2:-1]
    return model(b"\x80\x02" + b"]" * 90_000 + inner + b"a" * 90_000 + b".", bytes(4))


@case("model")
def legacy_pickle_of_sets() -> bytes:
    return b"\x80\x02](" + b"\x8f" * (LARGEST - 10)


@case("model")
def legacy_pickle_of_names() -> bytes:
    return b"\x80\x02](" + b"".join(b"ca\n%d\n" % n for n in range(900_000)) + b"e."


@case("model")
def tar_of_many_storages() -> bytes:
    each = b"(I%d\nNctorch\nFloatStorage\nt." + bytes(8)
    count = 100_000
    return tar(b"I%d\n." % count + b"".join(each.replace(b"%d", b"%d" % n) for n in range(count)) + b"N.")


@case("model")
def tar_of_many_tensors() -> bytes:
    storages = b"I1\n.(I0\nNctorch\nFloatStorage\nt." + bytes(8) + b"]."
    each = b"(I%d\nI0\nctorch\nFloatTensor\nt." + struct.pack("<iiqqq", 1, 0, 0, 1, 0)
    count = 100_000
    tensors = b"".join(each.replace(b"%d", b"%d" % n, 1) for n in range(1, count + 1))
    return tar(storages, b"I%d\n." % count + tensors)


# Headers.

ENTRY = '"{}":{"shape":[0],"data_offsets":[0,0],"dtype":"F32"}'


@case("model")
def header_of_another_order() -> bytes:
    return header(repeated(ENTRY + ",", 5 * MB, "{", '"z":{"shape":[0],"data_offsets":[0,0],"dtype":"F32"}}'))


@case("model")
def header_of_little_metadata() -> bytes:
    return header(repeated('"{}":"",', 5 * MB, '{"__metadata__":{', '"z":""}}'))


@case("model")
def header_of_escapes() -> bytes:
    return header(repeated('"\\u0041{}":"\\u0041",', 5 * MB, '{"__metadata__":{', '"z":""}}'))


@case("model")
def header_of_many_dimensions() -> bytes:
    dims = ",".join(["9223372036854775807"] * 3000)
    return header(repeated(ENTRY.replace("[0]", f"[0,{dims}]", 1) + ",", 5 * MB, "{", '"z":0}'))


@case("model")
def header_of_zeros_and_many_dimensions() -> bytes:
    dims = ",".join(["0", *["1"] * 30_000])
    return header(repeated(ENTRY.replace("[0]", f"[{dims}]", 1) + ",", 5 * MB, "{", '"z":0}'))


@case("model")
def header_of_nested_lists() -> bytes:
    return header('{"a":' + "[" * (5 * MB))


@case("model")
def header_of_short_entries_that_nest() -> bytes:
    return header(repeated('"{}":{"dtype":%s},' % ("[[]]," * 100), 5 * MB, "{", "}"))


@case("model")
def header_of_spaces() -> bytes:
    return header("{" + " " * (5 * MB) + "}")


WIDE = '{"__metadata__":{"\U0001f600":""'  # a text whose every character takes four bytes


@case("model")
def header_of_metadata_that_are_numbers() -> bytes:
    return header(repeated('"{}":1,', 7 * MB, WIDE + ",", '"z":""}}'))


@case("model")
def header_of_entries_with_objects_within() -> bytes:
    entry = '"{}":{"x":{"y":0},"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    return header(
        repeated(entry, 9 * MB, WIDE + "},", '"z":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}')
    )


# GGUF.


@case("model")
def gguf_of_many_tensors() -> bytes:
    return raw([], [info(f"{n:x}", (), 0) for n in range(150_000)])


@case("model")
def gguf_of_many_empty_tensors() -> bytes:
    return raw([], [info(f"{n:x}", (0,), 8) for n in range(250_000)])


@case("model")
def gguf_of_many_keys() -> bytes:
    return raw([key(f"{n:x}", 7, b"\0") for n in range(100_000)])


@case("model")
def gguf_of_too_many_keys() -> bytes:
    return raw([key(f"{n:x}", 7, b"\0") for n in range(500_000)])


@case("model")
def gguf_of_texts() -> bytes:
    return raw([key(f"{n:x}", 8, text("\U0001f600" * 16_000)) for n in range(150)])


@case("model")
def gguf_of_a_long_array() -> bytes:
    return raw([key("a", 9, struct.pack("<IQ", 8, 1 << 20) + text("") * (1 << 20))])


@case("model")
def gguf_of_an_endless_array() -> bytes:
    return raw([key("a", 9, struct.pack("<IQ", 8, 1 << 63) + bytes(9 * MB))])


@case("model")
def gguf_of_empty_arrays() -> bytes:
    return raw([key("a", 9, struct.pack("<IQ", 9, 800_000) + bytes(12 * 800_000))])


@case("model")
def gguf_of_nested_arrays() -> bytes:
    return raw([key("a", 9, struct.pack("<IQ", 9, 1) * 500_000)])


@case("model")
def gguf_of_many_shapes() -> bytes:
    shape = struct.pack("<IQ8q", 11, 8, *[1] * 8)
    return raw(
        [key(f"comfy.gguf.orig_shape.{n:x}", 9, shape) for n in range(45_000)],
        [info(f"{n:x}", (1,), 24, 32 * n) for n in range(45_000)],
        bytes(32 * 45_000),
    )


@case("model")
def gguf_whose_dimensions_overflow() -> bytes:
    return raw([], [info(f"{n:x}", (2**64 - 1,) * 8, 0) for n in range(80_000)])


# Indices and folders.


@case("model")
def index_of_most_lists() -> str:
    return '{"weight_map":[' + "[[]]," * (2 * MB) + "0]}"


@case("model")
def index_of_many_tensors() -> str:
    return repeated('"{}":"a",', 5 * MB, '{"weight_map":{', '"z":"a"}}')


@case("model")
def index_of_many_shards() -> str:
    return repeated('"{}":"{}",', 5 * MB, '{"weight_map":{', '"z":"a"}}')


@case("model")
def folder_with_a_deep_config() -> dict[str, bytes | str]:
    empty = header('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}')
    return {
        "model_index.json": '{"a":' + "[[]]," * (2 * MB),
        "unet/diffusion_pytorch_model.safetensors": empty,
        "vae/diffusion_pytorch_model.safetensors": empty,
        "text_encoder/model.safetensors": empty,
    }


# Recipes.

RECIPE = 'format = 1\nname = "a"\n'
SIZE = MB - 4096
MARKS = 380_000  # characters with as many dots and brackets as are looked at


def _recipe(text: str) -> str:
    assert len(text) < MB
    return text


@case("recipe")
def recipe_of_a_deep_key() -> str:
    return RECIPE + "a." * (SIZE // 2) + "a = 1\n"


@case("recipe")
def recipe_of_a_deep_heading() -> str:
    return RECIPE + "[" + "a." * (SIZE // 2) + "a]\n"


@case("recipe")
def recipe_of_deep_keys() -> str:
    return RECIPE + repeated("a{}" + ".a" * 900 + " = 1\n", MARKS)


@case("recipe")
def recipe_of_deep_headings() -> str:
    return RECIPE + repeated("[a{}" + ".a" * 90 + "]\n", MARKS)


@case("recipe")
def recipe_of_a_deep_list() -> str:
    return RECIPE + "a = " + "[" * (SIZE // 2) + "]" * (SIZE // 2) + "\n"


@case("recipe")
def recipe_of_deep_inline_tables() -> str:
    return RECIPE + "a = [" + repeated("{a=" * 90 + "1" + "}" * 90 + ",", MARKS) + "]\n"


@case("recipe")
def recipe_of_deep_metadata() -> str:
    return RECIPE + repeated("output.metadata.a{}" + ".a" * 25 + " = 1\n", MARKS)


@case("recipe")
def recipe_of_a_wide_list() -> str:
    return RECIPE + "base = [" + "1," * (SIZE // 2) + "]\n"


@case("recipe")
def recipe_of_lists() -> str:
    return RECIPE + "base = [" + "[]," * (SIZE // 3) + "]\n"


@case("recipe")
def recipe_of_many_problems_in_one_line() -> str:
    return RECIPE + repeated("{sha256=1},", SIZE, "output=[", "{}]\n")


@case("recipe")
def recipe_of_many_sources() -> str:
    return RECIPE + 'base="x"\n[sources]\n' + repeated('{}.file="a"\n', SIZE)


@case("recipe")
def recipe_of_many_sources_and_uses() -> str:
    half = SIZE // 2
    sources = repeated('aaaabbbb{}.file="a"\n', half)
    outputs = repeated('[[output]]\nname="{}"\nbase="bbbbaaaa{}"\n', half)
    return RECIPE + 'base="x"\n[sources]\n' + sources + outputs


@case("recipe")
def recipe_of_most_sources_and_unlike_uses() -> str:
    sources = "".join(f'{"ab" * 20}{n}.file="a"\n' for n in range(999))
    outputs = "".join(f'[[output]]\nname="{n}"\nbase="{"aabb" * 10}{n}"\n' for n in range(999))
    return RECIPE + 'base="x"\n[sources]\n' + sources + outputs


@case("recipe")
def recipe_of_most_outputs() -> str:
    outputs = "".join(
        f'[[output]]\nname="{n}"\n[output.components]\nUNET_v1={{from="a",component="unet-v1-sd"}}\n'
        for n in range(999)
    )
    picks = '[components]\n"CLIP-v1"="a"\nVAE-v1={from="a",component="VAE-v1-SD"}\n'
    return RECIPE + 'base = "NEW SD-v1"\n[sources.a]\nfile="x"\n' + picks + outputs


@case("recipe")
def recipe_of_most_steps_in_a_ring() -> str:
    steps = "".join(f"[steps.s{n}]\nop='x'\na='s{(n + 1) % 999}'\n" for n in range(999))
    return RECIPE + 'base = "s0"\n' + steps


@case("recipe")
def recipe_of_long_names() -> str:
    name = "ab" * 20_000
    sources = "".join(f'"{name}{n}".file = "a"\n' for n in range(10))
    outputs = "".join(f'[[output]]\nname="{n}"\nbase="ba{name}{n}"\n' for n in range(10))
    return RECIPE + 'base="x"\n[sources]\n' + sources + outputs


@case("recipe")
def recipe_of_one_long_unknown_key() -> str:
    return RECIPE + "".join(f'"{"ab" * 4000}{n}" = 1\n' for n in range(100))


@case("recipe")
def recipe_of_outputs_that_check_a_component() -> str:
    picks = (
        '[components]\nUNET-v1={from="a", component="UNET-v1-EMA"}\nVAE-v1={from="a",component="VAE-v1-SD"}\n'
    )
    outputs = repeated('[[output]]\nname="{}"\n', SIZE - 400)
    return RECIPE + 'base = "a"\n[sources]\na.file="x"\n' + picks + outputs


@case("recipe")
def recipe_of_an_address_of_tokens() -> str:
    return RECIPE + 'base="a"\n[sources.a]\nurls=["https://a/?' + "token" * (SIZE // 6) + '"]\n'


@case("recipe")
def recipe_of_addresses_of_tokens() -> str:
    return (
        RECIPE
        + 'base="a"\n[sources.a]\nurls=['
        + repeated(f'"https://a/{{}}?{"token" * 400}",', SIZE)
        + "]\n"
    )


@case("recipe")
def recipe_of_words_to_keep() -> str:
    return RECIPE + 'base="a"\nsources.a.file="b"\n[output]\nkeep=[' + repeated('"ab{}",', SIZE) + "]\n"


@case("recipe")
def recipe_of_block_weights() -> str:
    return RECIPE + 'base="a"\n[steps.a]\nop="merge"\nalpha="' + "1," * (SIZE // 2) + '1"\n'


@case("recipe")
def recipe_of_a_string_without_end() -> str:
    return RECIPE + 'a = """' + '\\"' * (SIZE // 2)


@case("recipe")
def recipe_of_a_large_number() -> str:
    return RECIPE.replace("1", "0x" + "f" * SIZE)


@case("recipe")
def recipe_of_comments() -> str:
    return RECIPE + "#\n" * (SIZE // 2)


# Locks.

LOCK = 'version = 1\nprofile = 1\nrecipe = "a"\n'
LOCK_SIZE = 4 * MB - 4096


@case("lock")
def lock_of_a_deep_key() -> str:
    return LOCK + "a." * (LOCK_SIZE // 2) + "a = 1\n"


@case("lock")
def lock_of_many_sources() -> str:
    return LOCK + repeated('[sources.{}]\nrequested=""\nsha256=""\nsize=1\n', LOCK_SIZE)


@case("lock")
def lock_of_small_tables() -> str:
    return LOCK + "".join(f"a{n}={{}}\n" for n in range(90_000))


@case("lock")
def lock_of_a_wrong_table() -> str:
    return LOCK + "components = [[" + "[]," * 90_000 + "]]\n"


@case("lock")
def lock_of_a_wrong_version() -> str:
    return "version = [" + "1," * (LOCK_SIZE // 2) + "]\n"


@case("lock")
def lock_of_another_syntax() -> str:
    return LOCK + repeated("a{}=1\n", MB) + "a1=2\n"


# Catalogs.

TABLE = 'name = "a"\nclass = "b"\nkeys = 1\nparameters = 1\n'


@case("catalog")
def table_of_braces() -> dict[str, bytes | str]:
    return {"a.toml": TABLE + "[tensors]\n" + repeated('"{}.{0..99999}" = [1]\n', SIZE)}


@case("catalog")
def table_of_a_long_name_in_braces() -> dict[str, bytes | str]:
    return {"a.toml": TABLE + "[tensors]\n" + f'"{{0..99999}}{"a" * SIZE}" = [1]\n'}


@case("catalog")
def table_of_deep_braces() -> dict[str, bytes | str]:
    return {"a.toml": TABLE + "[tensors]\n" + '"' + "{0..3000," * 150 + "a" + "}" * 150 + '" = [1]\n'}


@case("catalog")
def table_of_braces_that_overflow() -> dict[str, bytes | str]:
    return {"a.toml": TABLE + "[tensors]\n" + '"' + "{a,b}" * (SIZE // 5) + '" = [1]\n'}


@case("catalog")
def table_of_dimensions() -> dict[str, bytes | str]:
    return {"a.toml": TABLE + "[tensors]\na = [" + "9223372036854775807," * (SIZE // 20) + "]\n"}


@case("catalog")
def table_of_stars() -> dict[str, bytes | str]:
    return {
        "a.toml": TABLE + '[tensors]\n"' + "a" * 5000 + '" = [1]\n',
        "b.toml": 'name="c"\nextends="a"\nkeys=1\nwithout=["' + "a*" * 30 + 'b"]\n',
    }


@case("catalog")
def table_of_much_to_leave_out() -> dict[str, bytes | str]:
    table = TABLE.replace("keys = 1", "keys = 50000").replace("parameters = 1", "parameters = 50000")
    return {
        "a.toml": table + '[tensors]\n"{0..49999}" = [1]\n',
        "b.toml": 'name="c"\nextends="a"\nkeys=1\nwithout=[' + '"{1..9}*{0..9}*{0..9}*{0..9}*",' * 5 + "]\n",
    }


@case("catalog")
def tables_that_extend_each_other() -> dict[str, bytes | str]:
    table = TABLE.replace("keys = 1", "keys = 50000").replace("parameters = 1", "parameters = 50000")
    more = {
        f"{n:04}.toml": f'name="a{n}"\nextends="a{n - 1 if n else ""}"\nkeys=50000\nparameters=50000\n'
        for n in range(1200)
    }
    return {"a.toml": table + '[tensors]\n"{0..49999}" = [1]\n', **more}


@case("catalog")
def tables_that_extend_one() -> dict[str, bytes | str]:
    table = TABLE.replace("keys = 1", "keys = 50000").replace("parameters = 1", "parameters = 50000")
    more = {f"{n:04}.toml": f'name="a{n}"\nextends="a"\nkeys=50000\nparameters=50000\n' for n in range(1200)}
    return {"a.toml": table + '[tensors]\n"{0..49999}" = [1]\n', **more}


@case("catalog")
def known_files_of_one_kind() -> dict[str, bytes | str]:
    return {"known/a.toml": repeated(f'[[file]]\nname="{{}}"\nsha256="{"0" * 64}"\n', SIZE)}


@case("catalog")
def architectures() -> dict[str, bytes | str]:
    return {"architectures/a.toml": repeated('[{}]\nslots=["UNET-v1"]\n', SIZE)}


@case("catalog")
def architecture_of_many_slots() -> dict[str, bytes | str]:
    return {"architectures/a.toml": "[a]\nslots=[" + repeated('"{}",', SIZE) + "]\n"}


@case("catalog")
def classes() -> dict[str, bytes | str]:
    return {"classes.toml": "".join(f"[a{n}]\n" for n in range(90_000))}


@case("catalog")
def classes_of_blocks() -> dict[str, bytes | str]:
    return {
        "classes.toml": "".join(f'[a{n}]\nblocks={{"{{0..99999}}."="A{{0..99999}}"}}\n' for n in range(9_000))
    }


@case("catalog")
def programs() -> dict[str, bytes | str]:
    return {"programs.toml": "".join(f'[own{n}]\ncheckpoint="a"\nother="b"\n' for n in range(30_000))}


@case("catalog")
def layouts_in_a_chain() -> dict[str, bytes | str]:
    return {"diffusers.toml": "".join(f'[layouts.a{n}]\nextends="a{n + 1}"\n' for n in range(25_000))}


@case("catalog")
def layouts_of_rules() -> dict[str, bytes | str]:
    rules = (f'[rules.a{n}.same]\n"{{0..99999}}"="{{0..99999}}"\n' for n in range(14_000))
    return {"diffusers.toml": "".join(rules)}


# Records of a store.


@case("record")
def record_of_nested_lists() -> str:
    return "[" + "[[]]," * (2 * MB) + "0]"


@case("record")
def record_within_records() -> str:
    return '{"a":' * 100_000


# What says how far a download is.


@case("journal")
def journal_of_a_deep_line() -> str:
    return "[" * (10 * MB)


@case("journal")
def journal_of_many_lines() -> str:
    return "{}\n" + "1 1\n" * (8 * MB // 4 - 1)


@case("journal")
def journal_without_end() -> str:
    return "{}\n" + "1 1\n" * (10 * MB // 4)


def _put(path: Path, made: bytes | str | dict[str, bytes | str]) -> Path:
    if isinstance(made, dict):
        for name, data in made.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            _put(path / name, data)
    else:
        path.write_bytes(made.encode() if isinstance(made, str) else made)
    return path


@pytest.fixture(scope="module")
def readers() -> Iterator[Callable[[str], Reader]]:
    """Each reader's process, made when it is first asked for."""
    made: dict[str, Reader] = {}
    yield (
        lambda name: (
            made[name] if name in made else made.setdefault(name, Reader(name, 2 * SECONDS, 2 * MEMORY))
        )
    )
    for reader in made.values():
        reader.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_cost_of_a_hostile_input(tmp_path: Path, readers: Callable[[str], Reader], name: str) -> None:
    reader, make = CASES[name]
    found = readers(reader).cost(_put(tmp_path / "input.toml", make()))
    print(f"{name}: {found.seconds:.2f} s, {found.memory / 1e6:.0f} MB: {found.fact}")
    assert found.seconds < SECONDS
    assert found.memory < MEMORY

"""Every key and value of a TOML document is found at its true place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.base.errors import Place, Problem, RecipeError, render
from builder.base.toml import Keys, load, parse


def _place(text: str, *keys: str | int, value: bool = False) -> Place:
    return parse(text, "r.toml", RecipeError).place(*keys, value=value)


def _shown(place: Place) -> str:
    assert place.text is not None and place.column is not None
    return place.text[place.column - 1 : place.column - 1 + place.width]


RECIPE = '''\
format = 1
a . "q.k" = "x" # not = this
list = [ 1, [2, # [3]
  """x ] y"""], { k = 'v', deep.er = [ true ] } ]
[sources.anything]
file = "x.ckpt"
[[output]]
name = "one"
[output.metadata]
when = 1979-05-27 07:32:00
[[output]]
name = "two"
'''


@pytest.mark.parametrize(
    ("keys", "line", "key", "value"),
    [
        (("format",), 1, "format", "1"),
        (("a",), 2, "a", '"x"'),
        (("a", "q.k"), 2, '"q.k"', '"x"'),
        (("list",), 3, "list", "[ 1, [2, # [3]"),
        (("list", 1), 3, "[2, # [3]", "[2, # [3]"),
        (("list", 1, 1), 4, '"""x ] y"""', '"""x ] y"""'),
        (("list", 2), 4, "{ k = 'v', deep.er = [ true ] }", "{ k = 'v', deep.er = [ true ] }"),
        (("list", 2, "k"), 4, "k", "'v'"),
        (("list", 2, "deep", "er"), 4, "er", "[ true ]"),
        (("list", 2, "deep", "er", 0), 4, "true", "true"),
        (("sources", "anything"), 5, "anything", "anything"),
        (("sources", "anything", "file"), 6, "file", '"x.ckpt"'),
        (("output", 0), 7, "output", "output"),
        (("output", 0, "metadata", "when"), 10, "when", "1979-05-27 07:32:00"),
        (("output", 1), 11, "output", "output"),
        (("output", 1, "name"), 12, "name", '"two"'),
    ],
)
def test_places_of_every_form(keys: Keys, line: int, key: str, value: str) -> None:
    place = _place(RECIPE, *keys)
    assert (place.line, _shown(place)) == (line, key)
    assert _shown(_place(RECIPE, *keys, value=True)) == value


def test_what_is_not_written_is_at_the_nearest_thing_that_is() -> None:
    assert _place(RECIPE, "sources", "anything", "sha256").line == 5
    assert _place(RECIPE, "nothing") == Place("r.toml")


def test_lines_end_as_in_windows_too() -> None:
    assert _place("a = 1\r\n\r\nb = 2\r\n", "b") == Place("r.toml", 3, 1, 1, "b = 2")


@pytest.mark.parametrize(
    ("text", "line", "column", "fact"),
    [
        ("a = 1\na = [\n2]\n", 2, 1, "`a` is given twice"),
        ("[t]\nx.y = 1\n x.y = 2\n", 3, 2, "`x.y` is given twice"),
        ("a = 1\n[a]\n", 2, 2, "`a` is given twice"),
        ("[a]\n[b]\n[a]\n", 3, 2, "`a` is given twice"),
        ('\nx = "abc\n', 2, 9, "the line ends inside a string"),
        ("x = \n", 1, 4, "invalid value"),
        ("x\n", 1, 2, "expected `=` after a key in a key/value pair"),
    ],
)
def test_syntax_errors_say_where(text: str, line: int, column: int, fact: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.toml", RecipeError)
    [problem] = caught.value.problems
    assert problem.place is not None
    assert (problem.fact, problem.place.line, problem.place.column) == (fact, line, column)
    assert render(problem).count("\n") == 4


def test_deep_nesting_is_an_error() -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse("x = " + "[" * 100_000, "r.toml", RecipeError)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read"):
        load(tmp_path / "missing.toml", RecipeError)
    (tmp_path / "latin.toml").write_bytes(b"a = 1\nb = 'caf\xe9'\n")
    with pytest.raises(RecipeError, match="not UTF-8") as caught:
        load(tmp_path / "latin.toml", RecipeError)
    place = caught.value.problems[0].place
    assert place is not None and place.line == 2
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert load(tmp_path / "marked.toml", RecipeError).data == {"a": 1}


@dataclass
class _Writer:
    """Writes a document and notes where each key and value went."""

    draw: st.DrawFn
    text: str = ""
    keys: dict[Keys, tuple[int, int]] = field(default_factory=dict)
    values: dict[Keys, tuple[int, int]] = field(default_factory=dict)

    def one_of(self, *choices: str) -> str:
        return self.draw(st.sampled_from(choices))

    def put(self, piece: str) -> tuple[int, int]:
        start = len(self.text)
        self.text += piece
        return start, len(self.text)

    def key(self, name: str) -> tuple[int, int]:
        escaped = name.replace("\\", "\\\\").replace('"', '\\"')
        bare = name.isascii() and name.isidentifier()
        forms = [f'"{escaped}"'] + [f"'{name}'"] * ("'" not in name) + [name] * bare
        return self.put(self.one_of(*forms))

    def value(self, path: Keys, depth: int) -> None:
        start = len(self.text)
        kind = self.draw(st.integers(0, 2 if depth else 0))
        if kind == 0:
            plain = '"a, ] b"', "'# }'", "12", "1979-05-27 07:32:00", "-inf", '"""\n"" # ]"""', '"\\""', "[]"
            self.put(self.one_of(*plain, "'''it''s ]\n'''", "{}", '"""x"""""'))
        elif kind == 1:
            self.put("[")
            for index in range(self.draw(st.integers(1, 3))):
                self.put(self.one_of("", " ", "\n", " # ] , [\n\t"))
                self.value((*path, index), depth - 1)
                self.keys[(*path, index)] = self.values[(*path, index)]
                self.put(self.one_of(",", " ,", "\n, # }\n"))
            self.put("]")
        else:
            self.put("{")
            for number, name in enumerate(self.names()):
                self.put(", " if number else " ")
                self.pair((*path, name), depth - 1)
            self.put(self.one_of("}", " }"))
        self.values[path] = start, len(self.text)

    def names(self) -> list[str]:
        alphabet = st.sampled_from("ab.#]}=\"'\\ é")
        return self.draw(st.lists(st.text(alphabet, min_size=1, max_size=3), unique=True, max_size=3))

    def pair(self, path: Keys, depth: int) -> None:
        self.keys[path] = self.key(str(path[-1]))
        self.put(self.one_of("=", " = ", "\t= "))
        self.value(path, depth)

    def body(self, path: Keys) -> None:
        for name in self.names():
            self.put(self.one_of("", "  ", "# x = [\n", "\n"))
            self.pair((*path, "k" + name), 2)
            self.put(self.one_of("\n", " # c = 1\n"))

    def document(self) -> None:
        self.body(())
        for name in self.names():
            array = self.draw(st.booleans())
            for index in range(self.draw(st.integers(1, 2)) if array else 1):
                self.put("[[" if array else "[")
                path: Keys = ("t" + name, index) if array else ("t" + name,)
                self.keys[path] = self.values[path] = self.key("t" + name)
                self.put("]]\n" if array else " ]\n")
                self.body(path)
                if self.draw(st.booleans()):
                    self.put("[")
                    self.key("t" + name)
                    self.put(" . ")
                    self.keys[(*path, "sub")] = self.key("sub")
                    self.put("]\n")
                    self.body((*path, "sub"))


@settings(max_examples=60)
@given(st.data())
def test_every_key_of_any_document_is_found_at_its_true_place(data: st.DataObject) -> None:
    writer = _Writer(data.draw)
    writer.document()
    document = parse(writer.text, "any.toml", RecipeError)
    assert document.data == tomli.loads(writer.text)
    for spans, value in ((writer.keys, False), (writer.values, True)):
        for path, (start, end) in spans.items():
            found = document.place(*path, value=value)
            before = writer.text[:start]
            assert found.line == before.count("\n") + 1
            assert found.column == start - before.rfind("\n")
            assert _shown(found) == writer.text[start:end].split("\n")[0]


def test_of_a_long_line_what_is_around_the_place_is_shown() -> None:
    text = "a = [" + "1, " * 1000 + '"here", ' + "2, " * 1000 + "]\n"
    place = _place(text, "a", 1000)
    assert place.column == text.index('"here"') + 1 and place.text is not None and len(place.text) == 200
    assert place.text[place.column - 1 - place.cut :].startswith('"here"')
    *_, line, mark = render(RecipeError(Problem("wrong", place)).problems[0]).splitlines()
    assert line[mark.index("^") :].startswith('"here"') and mark.count("^") == len('"here"')


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("a = [" + "[" * 40 + "]" * 40 + "]", "nested too deeply"),
        ("a." * 40 + "a = 1", "nested too deeply"),
        ("a = [" + "1," * 200_000 + "]", "more than 100,000 keys and values"),
        ("a = 0x" + "f" * 6000, "a number has too many digits"),
        ("".join(f"a{n}{'.a' * 900} = 1\n" for n in range(200)), "more than 100,000 keys and values"),
    ],
)
def test_what_is_too_much(text: str, fact: str) -> None:
    with pytest.raises(RecipeError, match=fact):
        parse(text, "r.toml", RecipeError)


def test_much_prose_is_not_too_much() -> None:
    parse(
        'a = """' + "and so on... " * 1000 + '"""\nb = """' + "…\n.\n" * 50_000 + '"""', "r.toml", RecipeError
    )


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"#" * 200)
    with pytest.raises(RecipeError, match="200 bytes, more than 100"):
        load(tmp_path / "a.toml", RecipeError, limit=100)

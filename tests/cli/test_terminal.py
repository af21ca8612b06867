"""What a person sees: at 80 columns, in colours or without, and while work goes on."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.base.errors import Place, Problem, render
from builder.base.page import Style, cells, clip, columns, fold, pad
from builder.base.progress import Reporter
from builder.build import build_recipe
from builder.cli import terminal
from builder.cli.terminal import has_color, make_reporter
from tests.help.building import RECIPE, Folder
from tests.help.commands import ENDING, WAYS, prepared
from tests.help.screen import COLUMNS, lines, shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return prepared(Folder.below(tmp_path_factory.mktemp("terminal")))


# -- pages


@pytest.mark.parametrize(
    ("text", "width"),
    [("abc", 3), ("漢字", 4), ("e\u0301", 1), ("\x1b[1;31mred\x1b[0m", 3), ("ｱ", 1), ("각", 2), ("", 0)],
)
def test_widths_are_in_cells(text: str, width: int) -> None:
    assert cells(text) == width and cells(pad(text, 6)) == 6 and cells(clip("漢字漢字", 5)) == 4


def test_columns_of_wide_characters_stand_below_each_other() -> None:
    found = columns([("漢字", "1"), ("a", "22"), ("e\u0301e", "3")], {1}, indent=2)
    assert found == ["  漢字   1", "  a     22", "  e\u0301e     3"]


WORD = st.text("ab漢-/.`", min_size=1, max_size=30)


@given(st.lists(WORD, max_size=40), st.integers(20, 120))
def test_lines_are_broken_at_spaces_alone(words: list[str], width: int) -> None:
    text = "hint: " + " ".join(words)
    found = fold(text, width).split("\n")
    assert " ".join(line.strip() for line in found).split() == text.split()
    assert all(cells(line) <= width or len(line.split()) <= 2 for line in found)


def test_what_does_not_fit_hangs_below_its_column() -> None:
    row = "make  VAE-v1  the reason is a long one that does not fit"
    assert fold(row, 40).split("\n") == [
        "make  VAE-v1  the reason is a long one",
        "              that does not fit",
    ]
    # Nor where the last of its columns is too narrow for a word.
    assert fold("name  1,234  " + "x" * 30, 40).split("\n") == ["name  1,234", "  " + "x" * 30]
    assert fold("error: " + "word " * 9, 30).split("\n")[1].startswith("       word")
    assert fold("   = " + "word " * 9, 30).split("\n")[1].startswith("     word")
    assert fold("x" * 100, 30) == "x" * 100 and fold("a  b", None) == "a  b"


def test_of_a_quoted_line_the_place_is_shown() -> None:
    text = "key = [" + ", ".join(f'"{n}"' for n in range(100)) + "]"
    at = text.index('"77"')
    problem = Problem("no", Place("r.toml", 5, at + 1, 4, text))
    quoted, carets = render(problem, width=60).split("\n")[3:5]
    assert cells(quoted) <= 60 and cells(carets) <= 60
    assert quoted[carets.index("^") :].startswith('"77"') and carets.count("^") == 4
    assert render(problem).split("\n")[3] == f"5 | {text}"


# -- every command


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "good") for name in ENDING), *((name, "bad") for name in WAYS)]
)
def test_nothing_is_broken_at_80_columns(name: str, way: str, folder: Folder) -> None:
    here = folder.beside(f"{way} {name}")
    words = WAYS[name].good if way == "good" else WAYS[name].bad
    code, text = shown(here, *name.split(), *words.split())
    assert code == (0 if way == "good" else WAYS[name].code), text
    if name in ("schema", "new", "components learn") and way == "good":
        return  # what is printed is a file
    for line in lines(text):
        assert cells(line) <= COLUMNS or len(line.split()) == 1, line


def test_a_digest_is_on_one_line(folder: Folder) -> None:
    here = folder.beside("digest")
    _, text = shown(here, "build", "tiny.toml")
    (digest,) = [line for line in lines(text) if "sha256" in line]
    assert re.fullmatch(r"  sha256 [0-9a-f]{64}", digest)


def test_long_names_are_left_whole(folder: Folder) -> None:
    here = folder.beside("long")
    name = "a-very-long-name-" + "of-a-checkpoint-" * 6 + ".safetensors"
    (here / "vae.safetensors").rename(here / name)
    _, text = shown(here, "inspect", name)
    assert any(name in line for line in lines(text))


# -- colours


@pytest.mark.parametrize(
    ("environment", "terminal", "colored"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
    ],
)
def test_who_gets_colours(
    environment: dict[str, str], terminal: bool, colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    class Stream:
        def isatty(self) -> bool:
            return terminal

    assert has_color(Stream()) == colored


def test_the_first_word_is_coloured() -> None:
    text = "error: no\n   = x\nhint: do\nwarning: w\nnote: n\nwritten    a\nwrittenly  b\nan error: x"
    found = Style(True).words(text)
    assert found.split("\n") == [
        "\x1b[1;31merror\x1b[0m: no",
        "   = x",
        "\x1b[1;36mhint\x1b[0m: do",
        "\x1b[1;33mwarning\x1b[0m: w",
        "\x1b[1mnote\x1b[0m: n",
        "\x1b[1;32mwritten\x1b[0m    a",
        "writtenly  b",
        "an error: x",
    ]
    assert Style(False).words(text) == text


def test_colours_come_and_go(folder: Folder) -> None:
    here = folder.beside("colours")
    _, plain = shown(here, "build", "tiny.toml", environment={"NO_COLOR": "1"})
    _, dumb = shown(here, "build", "wrong.toml", environment={"TERM": "dumb"})
    _, colored = shown(here, "build", "wrong.toml")
    assert not re.search(r"\x1b\[[0-9;]*m", plain) and "\x1b" not in dumb
    assert "\x1b[1;31merror\x1b[0m: " in colored and "\x1b[1;36mhint\x1b[0m: " in colored
    assert dumb == re.sub(r"\x1b\[[0-9;]*m", "", colored)
    forced = here.process("build", "wrong.toml", FORCE_COLOR="1")
    assert forced.err.startswith("\x1b[1;31merror\x1b[0m: ")


# -- progress


def test_quiet_leaves_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    problem = Problem("half of it is gone", evidence=("3 of 6",))
    for quiet in (False, True):
        with make_reporter(quiet) as reporter:
            reporter.start("reading \x1b[2J", 100)
            reporter.advance("reading \x1b[2J", 100)
            reporter.advance("another", 1)
            reporter.finish("reading \x1b[2J")
            reporter.note("names mended")
            reporter.warn(problem)
        out, err = capsys.readouterr()
        warning = "warning: half of it is gone\n   = 3 of 6\n"
        assert (out, err) == ("", warning if quiet else f"note: names mended\n{warning}")


WORK = """
import time
import builder.cli.terminal as t
t.SHOW_AFTER = t.LINE_EVERY = t.DRAW_EVERY = 0.02
with t.make_reporter() as r:
    time.sleep(1)
    r.start('reading [b]', 4_000_000)
    r.advance('reading [b]', 1_000_000)
    r.start('another \\x1b[2J', 4_000_000)
    r.advance('another \\x1b[2J', 2_000_000)
    time.sleep(1)
    r.note('[red]x')
    r.finish('reading [b]')
    time.sleep(1)
"""


def test_slow_work_in_a_log_tells_where_it_is(folder: Folder) -> None:
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    found = done.stderr.splitlines()
    assert done.stdout == "" and "\x1b" not in done.stderr
    assert re.fullmatch(r"working: 0 B, \d:\d\d", found[0])
    assert any(
        re.fullmatch(r"another \\x1b\[2J: 3\.0 MB of 8\.0 MB \(38%\), \S+ MB/s, \d+:\d\d left", x)
        for x in found
    )
    assert "note: [red]x" in found
    assert ": 3.0 MB of 5.0 MB (60%)" in found[-1], "what was given up is expected no more"


def test_progress_on_a_terminal_is_a_line_that_goes_away(folder: Folder) -> None:
    code, text = shown(folder, code=WORK)
    assert code == 0
    drawn = [part for part in re.split(r"[\r\n]", re.sub(r"\x1b\[K", "", text)) if part]
    assert all(cells(part) < COLUMNS for part in drawn)
    assert re.fullmatch(r"\[> {19}\]  0 B  \d:\d\d  working", drawn[0])
    bar = r"\[=======> {12}\]  3\.0 MB of 8\.0 MB  \S+ MB/s  \d+:\d\d left  another \\x1b\[2J"
    assert any(re.fullmatch(bar, part) for part in drawn), drawn
    assert [line for line in lines(text) if line] == ["note: [red]x"]


def test_a_build_says_at_once_how_much_there_is_to_do(folder: Folder) -> None:
    """Whole outputs that are not begun yet are part of what is left."""
    here = folder.beside("much", store="anew")
    outputs = "".join(f'[[output]]\nname = "{name}"\n' for name in "ab")
    here.write("two.toml", RECIPE + outputs)
    heard: list[tuple[str, int]] = []

    class Heard(Reporter):
        def expect(self, total: int) -> None:
            heard.append(("expect", total))

        def start(self, task: str, total: int) -> None:
            heard.append((task, total))

    with here.workspace() as workspace:
        workspace.reporter = Heard()
        with workspace.sources() as sources:
            build_recipe(workspace, workspace.recipe(here / "two.toml"), sources)
    (word, expected), *tasks = heard
    assert word == "expect" and len(tasks) >= 3
    assert expected == pytest.approx(sum(count for _, count in tasks), rel=0.05)


def test_quick_work_shows_nothing(folder: Folder) -> None:
    assert "\r" not in shown(folder.beside("quick"), "store", "path")[1]


def test_progress_shows_within_a_second() -> None:
    assert terminal.SHOW_AFTER + terminal.DRAW_EVERY < 1

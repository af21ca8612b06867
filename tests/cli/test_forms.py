"""Answers for continuous integration: annotations of GitHub, SARIF 2.1.0, JUnit XML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from builder.base.errors import Place, Problem
from builder.cli.forms import Case, github, junit, sarif
from tests.help.building import Folder

HOSTILE = Problem(
    "a\x1b[31m ]]> <&\"' 100%\n::error::x", Place("a,b:c\n.toml", 3, 4), ("e\r\nf",), "do\x00 it"
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder.below(tmp_path).tiny()
    made.write("wrong.toml", 'format = 1\nname = "w"\nbase = "NEW SDv1"\nfixs = 1\n')
    return made


def check_sarif(text: str) -> list[dict[str, Any]]:
    """What the standard requires of a log, and of what is used of it; the results."""
    log = json.loads(text)
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    assert run["tool"]["driver"]["name"] == "ckpt-build"
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(set(rules)) == len(rules)
    (invocation,) = run["invocations"]
    assert isinstance(invocation["executionSuccessful"], bool)
    for result in run["results"]:
        assert result["message"]["text"] and result["level"] in {"none", "note", "warning", "error"}
        assert result["ruleId"] in rules
        for location in result.get("locations", ()):
            place = location["physicalLocation"]
            assert " " not in place["artifactLocation"]["uri"]
            if "region" in place:
                assert place["region"]["startLine"] >= 1 and place["region"]["startColumn"] >= 1
    results: list[dict[str, Any]] = run["results"]
    return results


def test_an_annotation_is_one_line() -> None:
    (line,) = github(HOSTILE).splitlines()
    assert line.startswith("::error file=a%2Cb%3Ac\\n.toml,line=3,col=4::a\\x1b[31m")
    assert "100%25" in line and "%0Ahint: do\\x00 it" in line
    assert github(Problem("x"), "warning") == "::warning::x"


def test_annotations(folder: Folder) -> None:
    said = folder("plan", "wrong.toml", "tiny.toml", "--output-format=github")
    assert said.code == 3 and "error: unknown key `fixs`" in said.err
    (line,) = [line for line in said.out.splitlines() if "fixs" in line]
    assert line.startswith("::error file=wrong.toml,line=4,col=1::unknown key `fixs`%0Ahint: did you mean")


def test_annotations_beside_the_object(folder: Folder) -> None:
    """For programs that run the command for GitHub: people and annotations on stderr."""
    said = folder("build", "wrong.toml", "tiny.toml", "--json", "--output-format=github", "--keep-going")
    assert said.code == json.loads(said.out)["code"] == 3
    lines = said.err.splitlines()
    assert any(line.startswith("written  ") for line in lines) and "error: unknown key `fixs`" in lines
    assert sum(line.startswith("::error file=wrong.toml,line=4,col=1::") for line in lines) == 1


def test_what_has_no_place_is_marked_in_the_recipe(folder: Folder) -> None:
    folder.write("gone.toml", (folder / "tiny.toml").read_text().replace("dirty.ckpt", "none.ckpt"))
    for more in ((), ("tiny.toml",)):
        said = folder("build", "gone.toml", *more, "--output-format=github")
        assert said.code == 5 and "::error file=gone.toml" in said.out


@pytest.mark.parametrize("command", ["build", "plan", "lock --check", "verify"])
@pytest.mark.parametrize("form", ["sarif", "junit", "github"])
def test_each_command_has_each_form(folder: Folder, command: str, form: str) -> None:
    assert folder("build", "tiny.toml").code == 0
    good = folder(*command.split(), "tiny.toml", "--output-format", form)
    bad = folder(*command.split(), "tiny.toml", "wrong.toml", f"--output-format={form}")
    assert good.code == 0 and bad.code == 3
    if form == "sarif":
        assert good.err == bad.err == ""
        assert [r for r in check_sarif(good.out) if r["level"] == "error"] == []
        errors = [r for r in check_sarif(bad.out) if r["ruleId"] == "recipe"]
        places = [r["locations"][0]["physicalLocation"] for r in errors]
        assert {
            "artifactLocation": {"uri": "wrong.toml"},
            "region": {"startLine": 4, "startColumn": 1},
        } in places
    elif form == "junit":
        assert good.err == bad.err == ""
        (suite,) = ElementTree.fromstring(good.out.encode())
        assert [c.get("name") for c in suite] == ["tiny.toml"] and suite.get("failures") == "0"
        (suite,) = ElementTree.fromstring(bad.out.encode())
        assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
        failed = [c for c in suite if c.find("failure") is not None]
        assert [c.get("name") for c in failed] == ["wrong.toml"]
        assert "fixs" in str(failed[0].findtext("failure"))
    else:
        assert "::error" not in good.out and "::error file=wrong.toml,line=4" in bad.out


def test_a_usage_error_has_the_form_too(folder: Folder) -> None:
    (result,) = check_sarif(folder("plan", "tiny.toml", "--nonsense", "--output-format", "sarif").out)
    assert result["ruleId"] == "usage"
    said = folder("plan", "none.toml", "--output-format=junit")
    (suite,) = ElementTree.fromstring(said.out.encode())
    assert suite.get("failures") == "1"


def test_no_words_and_words_cut_short(folder: Folder) -> None:
    assert folder().code == 2
    assert folder("plan", "tiny.toml", "--output-format").code == 2
    assert folder("plan", "tiny.toml", "--output-format", "xml").code == 2


@pytest.mark.parametrize(
    "address", ["https://h/a%20b/x.toml?v=1", "git+https://h/r#a/x.toml@v1", "hf://o/n/x.toml"]
)
def test_a_recipe_of_an_address_is_there(address: str) -> None:
    cases = [Case(address, 5, [Problem("not there", Place(address))])]
    (result,) = check_sarif(sarif(cases, [], 5))
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == address


def test_hostile_words_stay_words() -> None:
    cases = [Case("a\x1b<", 3, [HOSTILE]), Case("b", 0), Case("c", 0, (), True)]
    (suite,) = ElementTree.fromstring(junit("ckpt build", cases).encode())
    assert [(c.get("name"), len(c)) for c in suite] == [("a\\x1b<", 1), ("b", 0), ("c", 1)]
    assert suite.get("skipped") == "1"
    (result,) = check_sarif(sarif(cases, [], 3))
    assert "\x1b" not in result["message"]["text"]
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == "a%2Cb%3Ac%0A.toml"

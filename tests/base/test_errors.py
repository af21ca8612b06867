"""What is near a word and how long that may take to find out, and how errors read."""

from __future__ import annotations

import difflib
import pickle
import random
import time

from hypothesis import given
from hypothesis import strategies as st

from builder.base.errors import Place, Problem, RecipeError, nearest

WORDS = st.text("abcd-1", min_size=1, max_size=12)


@given(WORDS, st.lists(WORDS, max_size=9, unique=True))
def test_the_nearest_word_is_the_most_like_one(word: str, words: list[str]) -> None:
    found = nearest(word, words)
    best = max((difflib.SequenceMatcher(None, w, word).ratio() for w in words), default=0.0)
    if found is None:
        assert best < 0.6
    else:
        assert difflib.SequenceMatcher(None, found, word).ratio() == best >= 0.6


def test_words_that_nobody_writes_are_near_none() -> None:
    assert nearest("a" * 200, ["a" * 199]) is None
    assert nearest("a" * 99, ["a" * 98, "a" * 101]) == "a" * 98


def test_many_words_that_are_all_alike() -> None:
    chance = random.Random(1)
    words = ["".join(chance.sample("ab" * 40, 80)) for _ in range(1000)]
    before = time.process_time()
    nearest("ab" * 40, words)
    assert time.process_time() - before < 0.5


def test_an_exception_reads_as_its_problems_do() -> None:
    """In a traceback, a log or a notebook; and it goes from process to process whole."""
    place = Place("a.toml", 3, 1, 4, "fixs = []")
    problem = Problem("unknown key `fixs`", place, hint="did you mean `fixes`?")
    error = RecipeError(problem, Problem("no\x1bw"))
    said = "unknown key `fixs`\n  --> a.toml:3:1\n  |\n3 | fixs = []\n  | ^^^^\nhint: did you mean `fixes`?"
    assert str(error) == f"{said}\n\nno\\x1bw"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is RecipeError and again.problems == error.problems and again.exit_code == 3

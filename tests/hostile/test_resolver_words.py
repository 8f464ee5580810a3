"""uv may quote an author at length: what it says is searched in linear time."""

import re
import time

import pytest

from builder.errors import ServiceUnavailable
from builder.wheels.uv import _FAILURES, _MISSING_TIME, _NO_WHEEL, _OF_MARKERS, _READING, _STATUS, _WHEEL, _explanation

# So much is kept of what a resolver says: 200 lines of 4,000 characters.
MOST = 200 * 4000


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (_WHEEL, "a" * MOST),
        (_WHEEL, "a.whl" * (MOST // 5)),
        (_NO_WHEEL, "a" * MOST),
        (_NO_WHEEL, "a=" * (MOST // 2)),
        (_NO_WHEEL, "a==1 has no " * (MOST // 12)),
        (_NO_WHEEL, ("a" * 2000 + " " * 2000) * 200),
        (_OF_MARKERS, "`" * MOST),
        (_OF_MARKERS, ("`" + "a" * 999) * 800),
        (_MISSING_TIME, "`" * MOST),
        (_READING, ("`a" * 2000 + "\n") * 200),
        (_STATUS, "HTTP error " * (MOST // 11)),
        *((pattern, "429 " * 1000 + "\n") for pattern, *_ in _FAILURES),
        *((pattern, ("429 " * 1000 + "\n") * 200) for pattern, *_ in _FAILURES),
    ],
)
def test_words_of_any_length_are_searched_in_linear_time(pattern, text):
    began = time.process_time()
    re.search(pattern, text) if isinstance(pattern, re.Pattern) else re.search(pattern, text, re.IGNORECASE)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("word", ["a" * 4000, "a" * 3999 + "/", "`" * 4000])
def test_an_explanation_of_any_length_is_read_in_linear_time(word):
    began = time.process_time()
    assert len(_explanation("No solution found when resolving dependencies:\n" + f"{word}\n" * 200)) <= 2000
    assert time.process_time() - began < 5


MARKERS = "python_full_version == '3.11' and platform_machine == 'armv7l'"


def test_the_words_that_count_are_found():
    said = f"""error: No solution found when resolving dependencies for split (markers: {MARKERS})
  cause: Because scipy==1.15.2 has no `{MARKERS}`-compatible wheels and you require scipy==1.15.2, we can conclude that
         your requirements are unsatisfiable.

hint: The resolution failed for an environment that is not the current one"""
    why = _explanation(said)
    assert why.startswith("Because scipy==1.15.2 has no compatible wheels and you require")
    assert why.endswith("unsatisfiable.")
    assert _NO_WHEEL.search(why)[1] == "scipy"
    assert _NO_WHEEL.search("Because numpy<=1.9.3 has no usable wheels")[1] == "numpy"
    assert _NO_WHEEL.search("all of: a>=1 b<=2 have no compatible wheels")[1] == "b"
    assert _WHEEL.search("Failed to read `colorama-0.4.6-cp39-cp39-any.whl`")[1] == "colorama-0.4.6-cp39-cp39-any.whl"
    away = [
        error for pattern, _, error, _ in _FAILURES if re.search(pattern, "HTTP 503 Service Unavailable", re.IGNORECASE)
    ]
    assert away == [ServiceUnavailable]

"""uv may quote an author at length: what it says is searched in linear time."""

import re
import time
from pathlib import Path

import pytest
from packaging.version import Version

from builder.errors import ServiceUnavailable
from builder.package_index import Indexes
from builder.reference import Platform
from builder.wheels.requirements import Requirements
from builder.wheels.uv import (
    _FAILURES,
    _MISSING_TIME,
    _NO_WHEEL,
    _OF_MARKERS,
    _READING,
    _STATUS,
    _WHEEL,
    NoWheel,
    Question,
    Unsatisfiable,
    _error,
    _explanation,
)

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
        (_NO_WHEEL, ("(a==" * 1000 + " ") * 200),
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


def explained(said, *unfit):
    """Return the error for an explanation of uv's; `unfit` are the packages of which a version has no wheel."""
    question = Question(
        requirements=Requirements.of("a"),
        model=Path("/nonexistent"),
        platform=Platform.parse("linux/amd64"),
        python="3.11",
        glibc=None,
        as_of=None,
        unfit=dict.fromkeys(unfit, frozenset({Version("1")})),
    )
    return _error(question, 1, f"error: No solution found when resolving dependencies:\n{said}", Indexes())


@pytest.mark.parametrize("word", ["a" * 4000, "a" * 3999 + "/", "`" * 4000, "a. " * 1333])
def test_an_explanation_of_any_length_is_read_in_linear_time(word):
    said = f"{word}\n" * 200
    began = time.process_time()
    assert len(_explanation("No solution found when resolving dependencies:\n" + said)) <= MOST + 200
    error = explained(said, *(f"package-{number}" for number in range(1000)))
    assert isinstance(error, Unsatisfiable)
    assert len(error.what) <= 1000
    assert time.process_time() - began < 5


LONG = "Because only b>=2 is available and a==1 depends on b<1, we can conclude that a==1 cannot be used.\n" * 100


def test_a_missing_wheel_counts_wherever_a_long_explanation_names_it():
    said = (
        f"{LONG}Because scipy==1.0 has no wheels with a matching Python ABI tag, we can conclude that it is unusable."
    )
    error = explained(said)
    assert isinstance(error, NoWheel)
    assert error.package == "scipy"
    assert len(error.what) <= 1000
    assert isinstance(explained(LONG), Unsatisfiable)


def test_a_package_without_a_fitting_version_counts_wherever_a_long_explanation_names_it():
    error = explained(f"{LONG}And because you require scipy<2, your requirements are unsatisfiable.", "scipy", "numpy")
    assert isinstance(error, NoWheel)
    assert error.package == "scipy"
    for other in ("my-scipy", "scipy-x", "x.scipy", "scipy_x"):
        assert isinstance(explained(f"And because you require {other}<2.", "scipy"), Unsatisfiable)


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

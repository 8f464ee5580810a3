"""What uv and pip say may quote an author at length: it is searched in linear time."""

import time

import pytest

from builder.wheels.lock_pip import _NOT_FOUND, _UNFIT
from builder.wheels.uv import _AWAY

# So much is kept of what a resolver says: 200 lines of 4,000 characters.
MOST = 200 * 4000


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (_UNFIT, "a" * MOST),
        (_UNFIT, "a.whl" * (MOST // 5)),
        (_AWAY, "429 " * 1000 + "\n"),
        (_AWAY, ("429 " * 1000 + "\n") * 200),
        (_NOT_FOUND, ("Could not find a version that satisfies the requirement " * 70 + "\n") * 200),
        (_NOT_FOUND, "Could not find a version that satisfies the requirement " + " (from versions: " * 230),
        (_NOT_FOUND, "Could not find a version that satisfies the requirement x " + " (from y" * 400),
    ],
)
def test_words_of_any_length_are_searched_in_linear_time(pattern, text):
    began = time.process_time()
    pattern.search(text)
    assert time.process_time() - began < 5


def test_the_words_that_count_are_found():
    assert _UNFIT.search("ERROR: colorama-0.4.6-cp39-cp39-macosx.whl is not a supported wheel on this platform")[1]
    found = _NOT_FOUND.search(
        "ERROR: Could not find a version that satisfies the requirement numpy==9 (from -r x) (from versions: 1.0, 2.0)"
    )
    assert (found[1], found[2]) == ("numpy==9", "1.0, 2.0")
    assert _AWAY.search("HTTP 503 Server Error: Service Unavailable for url")

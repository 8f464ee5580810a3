"""An engine's output as far as a log has room for it: a RUN step can print without end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from builder.build.engine import Output

# The longest builds print some ten thousand lines; each has 4,000 characters at most.
MOST_LINES = 100_000


class BoundedOutput:
    """Hands on the first lines, and then says once that there are more.

    Args:
        output: called with each line that is shown.
        most: how many those are.
    """

    def __init__(self, output: Output, most: int = MOST_LINES) -> None:
        self._output = output
        self._left = most
        self._most = most

    def __call__(self, line: str) -> None:
        """Take one line."""
        if self._left > 0:
            self._output(line)
        elif self._left == 0:
            self._output(f"The build has printed {self._most:,} lines; the rest is not shown.")
        self._left -= 1

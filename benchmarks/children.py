"""What a child for each version costs: a sweep's first, and each further one, beside a fresh interpreter for each.

The work in them is none. All are timed from here, in turn.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.table import Table

from benchmarks.startup import figures
from builder.batch import Children
from builder.batch.sweep import MODULES
from builder.budget import Budget

ROUNDS = 5
CHILDREN = 20
FRESH, FIRST, FURTHER = "a fresh interpreter, MLflow imported", "the first child of a sweep", "each further child"
BUDGET = Budget(seconds=600, processor=600, memory=4 << 30, size=1 << 40)


def main() -> int:
    """Measure, and print a table."""
    seconds: dict[str, list[float]] = {FRESH: [], FIRST: [], FURTHER: []}
    imports = f"import {', '.join(MODULES)}"
    for _ in range(ROUNDS):
        seconds[FRESH].append(timed(lambda: subprocess.run([sys.executable, "-c", imports], check=True)))
        with Children(BUDGET, modules=MODULES) as children:
            nothing = partial(children.run, partial(str, "nothing"), str, whose="nothing")
            seconds[FIRST].append(timed(nothing))
            seconds[FURTHER] += [timed(nothing) for _ in range(CHILDREN)]
    table = Table("milliseconds", "min", "median", "max", title=f"A child for each version: {ROUNDS} sweeps in turn")
    for name, values in seconds.items():
        table.add_row(name, *figures([1000 * value for value in values], "{:.0f}"))
    Console(width=110, highlight=False).print(table)
    return 0


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())

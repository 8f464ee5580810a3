"""Another checkout of this program beside this one: `python -m benchmarks.compare CHECKOUT`.

Both publish the same versions, in turn and in the same rounds, from their own environments: cold, warm, and once more
with nothing to do. Ratios are this checkout's to the other's within a round; the median is shown. They decide nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environments import Environment, environments
from benchmarks.images import layers
from benchmarks.jobs import Outcome
from benchmarks.site import CHECKOUT, Round, Site, installed, new_round, site
from benchmarks.wheels import publish
from scripts.machine import native_platform

COLD, COLD_BARE, WARM, NOTHING = "cold", "cold, no bytecode", "warm", "nothing to do"
FIGURES = ("seconds", "peak memory", "image size")
LOG = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Program:
    """One of the two.

    Attributes:
        name: `before` or `after`.
        checkout: its folder.
        python: an interpreter with what it requires.
    """

    name: str
    checkout: Path
    python: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table for each environment."""
    known = {each.name: each for each in environments() if not each.lacking}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("checkout", type=Path, help="the other checkout")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument(
        "--only", nargs="+", default=["sklearn"], choices=list(known), metavar="NAME", help=f"of {', '.join(known)}"
    )
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    with site() as place:
        other = options.checkout.resolve()
        programs = [
            Program(name="before", checkout=other, python=installed(place.folder / "before", other)),
            Program(name="after", checkout=CHECKOUT, python=place.python),
        ]
        for name in options.only:
            show(known[name], list(measured(place, known[name], programs, options.runs)), console)
    return 0


def measured(
    place: Site, environment: Environment, programs: Sequence[Program], rounds: int
) -> Iterator[tuple[dict[str, dict[str, Outcome]], int, int]]:
    """Yield, for each round, the outcomes by job and program, and how many layers of how many both images share."""
    versions = environment.register(place.uri)
    for number in range(1, rounds + 1):
        found: dict[str, dict[str, Outcome]] = defaultdict(dict)
        with new_round(place, environment, versions, number) as turn:
            # Each is the first in every other round.
            for program in programs if number % 2 else programs[::-1]:
                for outcome in jobs(turn, program):
                    said = f"{outcome.cost.seconds:.2f} s" if outcome.cost else outcome.reason
                    LOG.print(f"  round {number}, {program.name}, {outcome.job}: {said}", markup=False)
                    found[outcome.job][program.name] = outcome
            name = f"{versions.first.name}:v{versions.first.version}"
            before, after = (layers(f"{turn.host}/{program.name}/{name}") for program in programs)
        yield found, len(set(before) & set(after)), len(after)


def jobs(turn: Round, program: Program) -> Iterator[Outcome]:
    """Publish with one program, from nothing and from what that leaves in the registry."""
    versions, native = turn.versions, native_platform()
    for job, version, namespace, bytecode in (
        (COLD_BARE, versions.first, f"{program.name}-bare", "false"),
        (COLD, versions.first, program.name, "true"),
        (WARM, versions.other, program.name, "true"),
        (NOTHING, versions.other, program.name, "true"),
    ):
        yield publish(
            turn,
            job,
            version,
            namespace,
            native,
            python=program.python,
            WHEEL_BYTECODE=bytecode,
            PYTHONPATH=str(program.checkout),
        )


def show(
    environment: Environment, rounds: Sequence[tuple[dict[str, dict[str, Outcome]], int, int]], console: Console
) -> None:
    """Print what was measured of one environment."""
    table = Table(title=f"{environment.title}: after, to before (median of {len(rounds)} rounds; min to max)")
    for head in ("job", *FIGURES):
        table.add_column(head, justify="left" if head == "job" else "right")
    for job in (COLD_BARE, COLD, WARM, NOTHING):
        ratios: dict[str, list[float]] = defaultdict(list)
        for found, _, _ in rounds:
            before, after = found[job]["before"], found[job]["after"]
            if before.cost and after.cost:
                ratios["seconds"].append(after.cost.seconds / before.cost.seconds)
                ratios["peak memory"].append(after.cost.peak / before.cost.peak)
                ratios["image size"].append(after.image_bytes / before.image_bytes)
        table.add_row(job, *(_ratio(ratios[figure]) for figure in FIGURES))
    console.print(table)
    console.print(f"layers that are the same in both images: {rounds[-1][1]} of {rounds[-1][2]}", markup=False)


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())

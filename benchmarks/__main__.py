"""Run the benchmarks: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import children, kaniko, plot, report, scale, startup
from benchmarks.environments import Environment, environments
from benchmarks.jobs import JobSkipped, Outcome
from benchmarks.results import Results
from benchmarks.rivals import RIVALS, TITLES, Rival
from benchmarks.site import CHECKOUT, Round, Site, new_round, site
from benchmarks.wheels import ours

JOBS: dict[str, Rival] = {**RIVALS, "ours": ours}
DOCKERFILE, STARTUP, CHILDREN, SCALE = "dockerfile", "startup", "children", "scale"
LOG = Console(stderr=True, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; what was measured never decides the exit code."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)
    known, load = environments(), os.getloadavg()[0]
    chosen = [each for each in known if each.name in options.only] or [
        each for each in known if options.large or not each.large
    ]
    wanted = [name for name in JOBS if name in options.only] or list(JOBS)
    everything: list[Results] = []
    if not options.only or not set(options.only) <= {DOCKERFILE, STARTUP, CHILDREN, SCALE}:
        with site() as place:
            for environment in chosen:
                results = measure(place, environment, wanted, options.runs)
                report.show(results, console)
                everything.append(results)
                if not options.dry:  # as far as it has come
                    write(options.folder, [each for each in everything if each.rounds], options.runs, load)
        console.print(report.machine_words(), markup=False)
    if not options.only or DOCKERFILE in options.only:
        os.environ.setdefault("KANIKO_IMAGE", "")
        kaniko.main()
    if not options.only or STARTUP in options.only:
        startup.main()
    if not options.only or CHILDREN in options.only:
        children.main()
    if not options.only or SCALE in options.only:
        scale.main([f"--rounds={options.runs}"])
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Publish model versions with ours and its rivals, in turn, on servers of this machine; print "
        "tables, and write docs/benchmarks.md and docs/benchmarks.svg.",
        epilog=f"Environments: {', '.join(each.name for each in environments())}. Jobs: {', '.join(JOBS)}. And "
        f"{DOCKERFILE}: our dockerfile method beside bare Kaniko; {STARTUP}: a publish with nothing to do; "
        f"{CHILDREN}: a child for each version of a sweep; {SCALE}: a large catalogue, in a cluster. "
        "KANIKO_IMAGE names Kaniko's image or its archive; "
        "BENCH_TORCH_INDEX an index of CPU builds of torch. The figures never decide the exit code.",
    )
    names = [*(each.name for each in environments()), *JOBS, DOCKERFILE, STARTUP, CHILDREN, SCALE]
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=names,
        metavar="NAME",
        help="environments and jobs to measure; where it names none of a kind, all of that kind",
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="how often each job is done (default: 3)")
    parser.add_argument("--large", action="store_true", help="the environments that need much disk and time, too")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing below docs/")
    parser.add_argument(
        "--folder", type=Path, default=CHECKOUT / "docs", help="where to write (default: the checkout's docs/)"
    )
    return parser.parse_args(arguments)


def measure(place: Site, environment: Environment, wanted: Sequence[str], rounds: int) -> Results:
    """Do the wanted jobs on one environment, some rounds of them."""
    results = Results(environment=environment)
    if environment.lacking:
        LOG.print(f"Skipped: {environment.title}: {environment.lacking}.", markup=False)
        return results
    LOG.print(f"{environment.title}: registering", markup=False)
    versions = environment.register(place.uri)
    for number in range(1, rounds + 1):
        results.rounds.append([])
        with new_round(place, environment, versions, number) as turn:
            for name in wanted:
                for outcome in attempt(turn, name):
                    said = f"{outcome.cost.seconds:.2f} s" if outcome.cost else outcome.reason
                    LOG.print(f"  round {number}, {outcome.job}: {said}", markup=False)
                    results.rounds[-1].append(outcome)
    return results


def attempt(turn: Round, name: str) -> list[Outcome]:
    """Do the jobs of one name; one that cannot be done here is an outcome too."""
    found: list[Outcome] = []
    try:
        found.extend(JOBS[name](turn))
    except JobSkipped as error:
        found.append(Outcome(job=TITLES.get(name, name), reason=f"skipped: {error}"))
    return found


def write(folder: Path, everything: Sequence[Results], rounds: int, load: float) -> None:
    """Write the page and the plot."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
    (folder / "benchmarks.svg").write_text(plot.plot(everything))
    report.write(folder / "benchmarks.md", "benchmarks.svg", everything, rounds, load)


if __name__ == "__main__":
    sys.exit(main())

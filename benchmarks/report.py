"""The tables: on the terminal, and as Markdown."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import rivals
from benchmarks.jobs import Cost
from benchmarks.results import COLD_RIVALS, Aim, Results
from benchmarks.site import uv, version_of

_MEGA = 1_000_000
_GIBI = 1 << 30
_NOTHING = "–"  # noqa: RUF001 - a dash in a table
_REASON = 160
_HEAD = """\
# Benchmarks

<!-- Written by `make bench`. -->

Each job is complete, from a tagged version in an MLflow server to its image in a registry, both on this machine, so the
rivals first download with MLflow's own command. All use the same base image, which the rivals have pulled before, and
the machine's own package index. Ours starts with empty local caches each time: cold, the registry has none of its
wheels; warm, it has all. Each round has a new registry and does every job once; ratios are within a round.
"""
_TAIL = """\
## What the columns mean

- *to better cold rival*: seconds, divided by those of the quicker of docker build and tuned BuildKit, cold.
- *sent*, *from registry*, *from MLflow*: bytes between the job and the server, HTTP headers included.
- *from outside*: bytes that the machine received on its outer interface during the job: the package index.
- *peak memory*: the maximum of the job's processes together (resident sets, sampled ten times a second), including
  Docker's daemon and its RUN steps if the benchmark started it.
- *image*: compressed layers and config.
- *first prediction*: from `docker run` to an answer to POST /invocations, with the image already pulled.
"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table.

    Attributes:
        title: its heading; empty for none.
        head: the columns' names, the first of words, the others of figures.
        rows: of cells.
    """

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def grids(results: Results) -> list[Grid]:
    """Return the tables of one environment: the jobs, the aims, where the time goes; those that are not empty."""
    head = (
        "job",
        "seconds: min / median / max",
        "to better cold rival",
        "to hot BuildKit",
        "sent, MB",
        "from registry, MB",
        "from outside, MB",
        "from MLflow, MB",
        "peak memory, MB",
        "image, MB",
        "first prediction, s",
    )
    jobs = Grid(title=results.environment.title, head=head, rows=[row(results, job) for job in results.jobs()])
    aims = [(aim.what, f"{aim.most:g}", number(aim.measured), verdict(aim)) for aim in results.aims()]
    stages = stage_rows(results)
    return [
        grid
        for grid in (
            jobs,
            Grid(title="Aims", head=("aim", "at most", "measured", ""), rows=aims),
            Grid(title="Where the time goes", head=("job", "seconds by stage, median"), rows=stages),
        )
        if grid.rows
    ]


def row(results: Results, job: str) -> tuple[str, ...]:
    """Return the figures of a job."""
    costs = results.costs(job)
    seconds = [cost.seconds for cost in costs]

    def mega(figure: Callable[[Cost], float]) -> str:
        value = results.median(job, figure)
        return _NOTHING if value is None else f"{value / _MEGA:.1f}"

    return (
        job,
        " / ".join(f"{value(seconds):.2f}" for value in (min, statistics.median, max)) if seconds else _NOTHING,
        ratio(results, job, COLD_RIVALS),
        ratio(results, job, (rivals.BUILDKIT_HOT,)),
        mega(lambda cost: cost.sent),
        mega(lambda cost: cost.received),
        mega(lambda cost: cost.outside),
        mega(lambda cost: cost.model),
        mega(lambda cost: cost.peak),
        number(results.size(job), 1),
        number(results.start(job)),
    )


def ratio(results: Results, job: str, rivals_of_it: Sequence[str]) -> str:
    """Return the median of the ratios round by round."""
    values = results.ratios(job, rivals_of_it)
    return number(statistics.median(values) if values else None, 3)


def number(value: float | None, digits: int = 2) -> str:
    """Return a figure as text."""
    return _NOTHING if value is None else f"{value:.{digits}f}"


def verdict(aim: Aim) -> str:
    """Return whether an aim was reached."""
    if aim.measured is None:
        return "not measured"
    if aim.measured <= aim.most:
        return "reached"
    return f"missed by {100 * (aim.measured / aim.most - 1):.0f} %"


def stage_rows(results: Results) -> list[tuple[str, ...]]:
    """Return the median seconds by stage of the jobs that tell."""
    rows: list[tuple[str, ...]] = []
    for job in results.jobs():
        costs = [cost for cost in results.costs(job) if cost.stages]
        if costs:
            stages = {name: [cost.stages[name] for cost in costs if name in cost.stages] for name in costs[0].stages}
            rows.append((job, ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in stages.items())))
    return rows


def notes(results: Results) -> list[str]:
    """Return why jobs have no figures, or not all."""
    return [f"{job}: {results.reason(job)}" for job in results.jobs() if results.reason(job)]


def show(results: Results, console: Console) -> None:
    """Print the tables of one environment."""
    for grid in grids(results):
        table = Table(title=grid.title, title_justify="left")
        for index, name in enumerate(grid.head):
            table.add_column(name, justify="left" if index == 0 or len(grid.head) == 2 else "right")  # noqa: PLR2004
        for cells in grid.rows:
            table.add_row(*cells)
        console.print(table)
    for note in notes(results):
        console.print(note, style="dim", markup=False)


def write(path: Path, plot: str, everything: Sequence[Results], rounds: int, load: float) -> None:
    """Write the page.

    Args:
        path: of the Markdown file.
        plot: name of the plot beside it.
        everything: the environments' results.
        rounds: how often each job was done.
        load: how many processes ran on this machine before the first job, on average.
    """
    lines = [
        _HEAD,
        f"Rounds: {rounds}. {machine_words()} Load before the first job: {load:.1f}.",
        "",
        f"![Seconds from the tagged version to the pushed image]({plot})",
    ]
    for results in everything:
        lines += ["", f"## {results.environment.title[0].upper()}{results.environment.title[1:]}"]
        for grid in grids(results):
            if grid.title != results.environment.title:
                lines += ["", f"### {grid.title}"]
            lines += ["", markdown(grid)]
        for note in notes(results):
            words = note if len(note) <= _REASON else f"{note[:_REASON]}…"
            lines += ["", f"{words}"]
    path.write_text("\n".join([*lines, "", _TAIL]))


def markdown(grid: Grid) -> str:
    """Return a table as Markdown."""
    right = "---" if len(grid.head) == 2 else "---:"  # noqa: PLR2004
    rows = [grid.head, ("---", *(right for _ in grid.head[1:])), *grid.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def machine_words() -> str:
    """Return what machine this is, in a sentence or two."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIBI
    versions = [
        f"Python {platform.python_version()}",
        f"MLflow {installed('mlflow')}",
        version_of(str(uv()), "--version").split(" (")[0],
        version_of("dockerd", "--version").split(",")[0],
        version_of("buildah", "--version").split(" (")[0],
        " ".join(version_of("docker-registry", "--version").split()[::2]),
    ]
    kernel = f"{platform.machine()}, {platform.system()} {platform.release().partition('-')[0]}"
    return (
        f"Machine: {os.cpu_count()} cores, {memory:.0f} GiB of memory, {kernel}; {', '.join(filter(None, versions))}."
    )

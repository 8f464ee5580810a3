"""What people see beside logs: a plan, tables of results, the progress of a publish."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from builder.log import get_logger, metered
from builder.masking import json_visible, masked, one_line, shown, visible
from builder.plan import Keep

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from builder.batch import Result
    from builder.batch.warm import Warmed
    from builder.cluster.status import Status
    from builder.doctor import Finding
    from builder.models.context import Progress
    from builder.models.webhooks import Webhook
    from builder.plan import Plan


log = get_logger("show")

_UNITS = ("B", "kB", "MB", "GB", "TB")
_THOUSAND = 1000
_MOST_FILES = 20
# A column of the status is padded to this many characters at most.
_WIDEST = 60
_LONGEST_FOUND = 1000
_COLUMNS = "MODEL VERSION STATE METHOD PLATFORMS DIGEST ATTEMPTS SINCE NEXT-TRY JOB ERROR"
# A reference is never masked.
_OURS = frozenset({"image", "digest", "job"})


def size(count: float | None) -> str:
    """Return a number of bytes for people; `?` where it is not known."""
    if count is None:
        return "?"
    for unit in _UNITS:
        if count < _THOUSAND or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _THOUSAND
    raise AssertionError


def plan(planned: Plan, *, engine: str, push_checked: bool, smoke_test: str) -> str:
    """Return a plan as text.

    Args:
        planned: the plan.
        engine: the engine that would build here.
        push_checked: whether it was seen that the credential may push.
        smoke_test: what would be done to see that the image answers.
    """
    version = planned.version
    name = one_line(version.name, 200)
    rows = [
        ("model", f"{name} version {version.version}, registered {version.created:%Y-%m-%d %H:%M} UTC"),
        ("action", f"{planned.action}: {planned.reason}"),
        ("tag", str(planned.reference) + (", push allowed" if push_checked else "")),
        ("there now", str(planned.observed) if planned.observed else "nothing"),
        ("source id", planned.source_id),
    ]
    for step in planned.platforms:
        if isinstance(step, Keep):
            rows.append((str(step.platform), f"keep {step.kept}"))
            continue
        base = f", base {step.base.name} at {step.base.digest}" if step.base else ""
        how = "assemble" if step.method == "wheels" else f"build with {engine}"
        rows.append((str(step.platform), how + base))
        rows += [("", one_line(note, 300)) for note in step.notes]
        if step.layers:
            layers = step.layers
            missing = f"{len(layers.missing)} wheels to get ({size(layers.download)})"
            rows.append(("", f"wheel layers: {layers.known} known, {missing}"))
            rows += [("", f"  {name}") for name in layers.missing[:_MOST_FILES]]
            if len(layers.missing) > _MOST_FILES:
                rows.append(("", f"  … and {len(layers.missing) - _MOST_FILES} more; --json lists them all"))
            rows += [("", f"warning: {line}") for line in layers.lacks[:_MOST_FILES]]
            rows.append(("", f"model: {size(layers.model)} to send, less what is there"))
    rows += [("", f"warning: {change}") for change in planned.changes]
    if planned.builds:
        rows.append(("smoke test", smoke_test))
        known = sum(artifact.size or 0 for artifact in planned.artifacts)
        rows.append(("context", f"{len(planned.artifacts)} files, {size(known)}"))
    width = max(len(name) for name, _ in rows)
    rows += [("", f"{artifact.path}  {size(artifact.size)}") for artifact in planned.artifacts[:_MOST_FILES]]
    if len(planned.artifacts) > _MOST_FILES:
        rows.append(("", f"… and {len(planned.artifacts) - _MOST_FILES} more; --json lists them all"))
    lines = [f"{name:<{width}}  {_cell(text)}" for name, text in rows]
    if planned.dockerfile:
        # Where Docker ends a line, and nowhere else: a separator of Unicode's begins no instruction.
        instructions = planned.dockerfile.removesuffix("\n").split("\n")
        lines += ["", "Dockerfile", *(f"  {shown(line.removesuffix(chr(13)))}" for line in instructions)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return a text that others may have written, fit for one place of a screen: nothing is cut, no blank is lost."""
    return visible(masked(text))


def results(event: str, found: Sequence[Result]) -> None:
    """Show what became of versions: a table on a terminal, one line of the log elsewhere.

    Args:
        event: what was done, `swept` or `downloaded`.
        found: the results, in their order.
    """
    counts = Counter(result.state for result in found)
    waiting = [result.name for result in found if result.state == "waiting"]
    remedy = "What waits has failed too often: it is tried again when it is changed, or with --retry-failed."
    if not sys.stderr.isatty():
        notes = {"waiting": waiting, "remedy": remedy} if waiting else {}
        log.info(event, versions=len(found), states=dict(counts), **notes)
        return
    caption = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no version carries the target tag"
    _table(found, caption + (f". {remedy}" if waiting else ""))


def as_json(found: Sequence[Result | Status | Webhook | Finding]) -> str:
    """Return results, versions, webhooks, or what checks found, as a JSON array; what others wrote in it is masked."""
    from builder.batch import Result

    rows = []
    for each in found:
        row = _row(each) if isinstance(each, Result) else asdict(each)
        rows.append({key: _fit(key, value) for key, value in row.items()})
    return json_visible(json.dumps(rows, indent=2, ensure_ascii=False))


def _fit(key: str, value: object) -> object:
    return masked(value) if isinstance(value, str) and key not in _OURS else value


def _row(result: Result) -> dict[str, object]:
    version = result.version
    return {
        "model": version.name if version else result.name,
        "version": version.version if version else "",
        "state": result.state,
        "image": str(result.reference or ""),
        "folder": str(result.folder or ""),
        "detail": result.detail,
        "exit_code": result.exit_code,
    }


def statuses(found: Sequence[Status], *, heading: bool = True) -> str:
    """Return what is known of versions as a table: one line for each, the error last.

    Args:
        found: the versions.
        heading: whether the names of the columns come first.
    """
    if not found:
        return "No version carries the target tag."
    rows = [_COLUMNS.split()] if heading else []
    for each in found:
        cells = asdict(each)
        cells["platforms"] = ",".join(each.platforms)
        cells["digest"] = each.digest[: len("sha256:") + 12]
        cells["attempts"] = str(each.attempts or "")
        rows.append([_cell(cells[column.lower().replace("-", "_")]) or "-" for column in _COLUMNS.split()])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return lines of cells in columns, each padded to its longest cell, or to 60 characters."""
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def findings(found: Sequence[Finding]) -> str:
    """Return what checks found as a table: a line for each, and what to do below it."""
    width = max(len(each.check) for each in found)
    lines = []
    for each in found:
        lines.append(f"{each.state:<7}  {each.check:<{width}}  {_cell(one_line(each.found, _LONGEST_FOUND))}")
        if each.remedy:
            lines.append(f"{'':<7}  {'':<{width}}  -> {_cell(one_line(each.remedy, _LONGEST_FOUND))}")
    counts = Counter(each.state for each in found)
    lines.append(", ".join(f"{counts[state]} {state}" for state in ("ok", "warn", "fail", "skipped") if counts[state]))
    return "\n".join(lines)


def webhooks(found: Sequence[Webhook]) -> str:
    """Return MLflow's webhooks as a table."""
    if not found:
        return "This MLflow server has no webhook."
    rows = [("ID", "NAME", "ACTIVE", "URL", "EVENTS")]
    rows += [(each.id, each.name, "yes" if each.active else "no", each.url, ",".join(each.events)) for each in found]
    return aligned([[_cell(cell) for cell in row] for row in rows])


def warmed(found: Sequence[Warmed]) -> None:
    """Show what became of environments: a table on a terminal, one line of the log for each elsewhere."""
    if not sys.stderr.isatty():
        for result in found:
            log.info(result.state, of=result.name, known=result.known, made=result.made, detail=result.detail)
        return
    layers = [(str(result.known), str(result.made)) for result in found]
    _table(found, "" if found else "no version carries the target tag", ("known", "made"), layers)


def _table(
    found: Sequence[Result], caption: str, more: Sequence[str] = (), values: Sequence[Sequence[str]] = ()
) -> None:  # fmt: skip
    """Print a table of results, with further columns between state and detail, and their values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("model", "version", "state", *more, "detail", caption=Text(caption), caption_justify="left")
    for result, further in zip(found, values or [()] * len(found), strict=True):
        of = (result.version.name, result.version.version) if result.version else (result.name, "")
        # Names and errors come from others: as text they cannot be taken for markup.
        table.add_row(*(Text(_cell(cell)) for cell in (*of, result.state, *further, result.summary)))
    Console(stderr=True).print(table)


@contextmanager
def progress() -> Iterator[Progress | None]:
    """Show on a terminal what moves: artifacts, wheels, layers, uploads; elsewhere nothing is shown.

    A line is there as long as there is something to wait for, and is drawn ten times a second at most.

    Yields:
        A callable for the progress of the artifacts; None where nothing is shown.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        meter = _Bars(bar)
        with metered(meter):
            yield meter.artifacts


class _Bars:
    """A line for each kind of transfer, shown only while there is something to wait for."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._amounts: dict[str, tuple[int, int]] = {}

    def __call__(self, what: str, done: int, more: int) -> None:
        with self._lock:
            before, total = self._amounts.get(what, (0, 0))
            self._set(what, before + done, total + more)

    def artifacts(self, done: int, total: int) -> None:
        """Show how many bytes of how many are here; see `builder.models.context.Progress`."""
        with self._lock:
            self._set("artifacts", done, total)

    def _set(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=None, visible=False, amount="")
        self._amounts[what] = done, total
        # Of some wheels no index says how large they are.
        most = max(done, total)
        amount = f"{done} of {most}" if what == "layers" else f"{size(done)} of {size(most)}"
        self._bar.update(self._tasks[what], completed=done, total=most, amount=amount, visible=done < most)

"""Logs and timings: structured, on stderr; text on a terminal, JSON elsewhere; secrets masked."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import structlog

from builder.masking import MASK, indented, mask, masked, one_line, visible

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["MASK", "configure", "get_logger", "mask", "masked", "safe_line"]

_TRACEBACKS = frozenset({"exception", "stack"})

logging.getLogger("builder").addHandler(logging.NullHandler())


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the moment: a display of progress prints lines above itself there."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # the base has an attribute
        return sys.stderr


def _shown_event(_logger: object, _method: str, event: structlog.typing.EventDict) -> Mapping[str, Any]:
    """Make an event fit for people, keys included: without secrets, and every value one line but a traceback."""
    return {_shown(key): (_traceback if key in _TRACEBACKS else _shown)(value) for key, value in event.items()}


def _shown_foreign(logger: object, method: str, event: structlog.typing.EventDict) -> Mapping[str, Any]:
    """Make a record of the standard library's fit for people; structlog's own fields stay as they are."""
    own = {key: event.pop(key) for key in ("_record", "_from_structlog")}
    return {**_shown_event(logger, method, event), **own}


def _shown(value: Any) -> Any:  # an event holds any type
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return {_shown(str(key)): _shown(item) for key, item in value.items()}
    return visible(masked(str(value)))


def _traceback(value: Any) -> str:
    """Return a traceback whose every line is indented, so that none can be taken for a line of the log."""
    return indented(str(value))


def configure(log_format: str = "auto", level: str = "info") -> None:
    """Send the logs of this package to stderr, and what other packages log or warn of in the same form.

    Args:
        log_format: `text`, `json`, or `auto` for text on a terminal and JSON elsewhere.
        level: the least severe level shown: debug, info, warning or error.
    """
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0, sort_keys=False)
        if text
        else structlog.processors.JSONRenderer()
    )
    handler = _Stderr()
    timestamp = structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, timestamp, renderer],
            # What libraries say of a server's answers, or of an author's files, is others' text as well.
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.format_exc_info,
                _shown_foreign,
            ],
        )
    )
    ours = logging.getLogger("builder")
    ours.handlers[:] = [handler]
    ours.setLevel(level.upper())
    ours.propagate = False
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(handler)
        # Libraries say more than anybody asked for below a warning.
        logging.getLogger().setLevel(max(logging.WARNING, ours.level))
        logging.captureWarnings(capture=True)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger `builder.<name>`, which takes an event and keyword arguments."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(f"builder.{name}"),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            # To text, without local variables, before anything is masked.
            structlog.processors.format_exc_info,
            _shown_event,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
    )
    return logger


def safe_line(text: str) -> str:
    """Return one line of another program's output, fit for a log: no control character, no secret."""
    return one_line(text, 4000)


class Meter(Protocol):
    """Counts what moves; it is called from any thread, several times for each MiB."""

    def __call__(self, what: str, done: int, more: int) -> None:
        """Count.

        Args:
            what: `wheels` and `uploads` are in bytes, `layers` are counted.
            done: how much has moved since the last call; negative where a transfer begins again.
            more: how much has turned out to have to move, in addition to what was known.
        """
        ...


_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)
_lock = threading.Lock()
# Of one publish: threads that it begins share it, since they have a copy of its context.
_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)
_blobs: ContextVar[dict[str, tuple[int, int]] | None] = ContextVar("blobs", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Add the time that passes inside to a stage's; stages may overlap, and several threads may be in one."""
    began = time.monotonic()
    seconds = _seconds.get()
    if seconds is None:
        seconds = {}
        _seconds.set(seconds)
    try:
        yield
    finally:
        with _lock:
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began


def taken() -> dict[str, float]:
    """Return the seconds of each stage so far in this context, and begin anew."""
    with _lock:
        seconds = {name: round(value, 3) for name, value in (_seconds.get() or {}).items()}
    _seconds.set({})
    return seconds


def transferred(blob: str, size: int, *, sent: int) -> None:
    """Count a blob that an image needs, once for each publish, however many repositories it is put into.

    Args:
        blob: its digest.
        size: its bytes.
        sent: how many of them were sent; 0 if the registry had it.
    """
    with _lock:
        blobs = _blobs.get()
        if blobs is None:
            blobs = {}
            _blobs.set(blobs)
        blobs[blob] = (size, blobs.get(blob, (0, 0))[1] + sent)


def transfers() -> tuple[int, int]:
    """Return the bytes of blobs that were sent, and of those that the registry had, in this context; begin anew."""
    with _lock:
        blobs = list((_blobs.get() or {}).values())
    _blobs.set({})
    return sum(sent for _, sent in blobs), sum(size for size, sent in blobs if not sent)


@contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Have a meter count what moves in the context, in threads that are begun there as well."""
    token = _meter.set(meter)
    try:
        yield
    finally:
        _meter.reset(token)


def moved(what: str, done: int = 0, *, more: int = 0) -> None:
    """Count with the meter of this context, if it has one; see `Meter`."""
    meter = _meter.get()
    if meter:
        meter(what, done, more)

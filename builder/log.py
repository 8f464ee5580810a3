"""Logs: structured, on stderr; text on a terminal, JSON elsewhere; secrets masked wherever they could stand.

The loggers are the standard library's, named `builder.…`: an application that uses this package as a library decides
where its logs go, and nothing is printed unless it does. The command line calls `configure`.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import structlog

from builder.errors import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MASK = "*****"
# Shorter values are words that stand everywhere: to mask them would hide the log, not the secret.
_SHORTEST_SECRET = 6

_secrets: set[str] = set()

logging.getLogger("builder").addHandler(logging.NullHandler())


def mask(secrets: Iterable[str]) -> None:
    """Add values that no log line may show."""
    _secrets.update(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)


def known_secrets() -> frozenset[str]:
    """Return the values that no log line may show: a child that logs for this process has to know them as well."""
    return frozenset(_secrets)


def masked(text: str) -> str:
    """Return `text` with every known secret replaced by asterisks."""
    # The longest first: one secret may begin another.
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def _mask_event(_logger: object, _method: str, event: structlog.typing.EventDict) -> Mapping[str, Any]:
    return {key: _mask_value(value) for key, value in event.items()}


def _mask_value(value: Any) -> Any:  # an event holds any type
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, (list, tuple)):
        return [_mask_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _mask_value(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return masked(str(value))


def configure(log_format: str = "auto", level: str = "info") -> None:
    """Send the logs of this package to stderr.

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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text),
                renderer,
            ]
        )
    )
    root = logging.getLogger("builder")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


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
            _mask_event,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
    )
    return logger


def safe_line(text: str) -> str:
    """Return one line of another program's output, fit for a log: no control character, no secret."""
    return one_line(masked(text), 4000)

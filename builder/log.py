"""Logs: structured, on stderr; text on a terminal, JSON elsewhere; secrets masked wherever they could stand."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import structlog

from builder.errors import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable

MASK = "*****"
# Shorter values are words that stand everywhere: to mask them would hide the log, not the secret.
_SHORTEST_SECRET = 6

_secrets: set[str] = set()


def mask(secrets: Iterable[str]) -> None:
    """Add values that no log line may show."""
    _secrets.update(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)


def masked(text: str) -> str:
    """Return `text` with every known secret replaced by asterisks."""
    for secret in _secrets:
        text = text.replace(secret, MASK)
    return text


def _mask_event(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
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
    """Send logs to stderr.

    Args:
        log_format: `text`, `json`, or `auto` for text on a terminal and JSON elsewhere.
        level: the least severe level shown: debug, info, warning or error.
    """
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"), pad_event_to=0, sort_keys=False
        )
        if text
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text),
            _mask_event,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """Return a logger whose events carry the part of the program they come from."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(part=name)
    return logger


def safe_line(text: str) -> str:
    """Return one line of another program's output, fit for a log: no control character, no secret."""
    return one_line(masked(text), 4000)

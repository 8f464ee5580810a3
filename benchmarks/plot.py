"""The plot: the seconds of every job, as bars, for each environment."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from benchmarks.results import Results

_WIDTH, _LEFT, _RIGHT = 860, 300, 90
_BAR, _GAP, _TITLE, _BETWEEN = 16, 6, 26, 18
_OURS, _THEIRS = "#1f6f8b", "#b8b8b8"


def plot(everything: Sequence[Results]) -> str:
    """Return an SVG document; each environment has a scale of its own, from zero."""
    parts: list[str] = []
    top = _BETWEEN
    for results in everything:
        bars = [
            (job, seconds)
            for job in results.jobs()
            if (seconds := results.median(job, lambda cost: cost.seconds)) is not None
        ]
        if not bars:
            continue
        parts.append(
            f'<text x="12" y="{top + 14}" font-weight="bold">{escape(results.environment.title)}: '
            "seconds, median</text>"
        )
        top += _TITLE
        most = max(seconds for _, seconds in bars)
        for job, seconds in bars:
            length = max((_WIDTH - _LEFT - _RIGHT) * seconds / most, 1)
            colour = _OURS if job.startswith("ours") else _THEIRS
            middle = top + _BAR - 4
            parts += [
                f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end">{escape(job)}</text>',
                f'<rect x="{_LEFT}" y="{top}" width="{length:.1f}" height="{_BAR}" fill="{colour}"/>',
                f'<text x="{_LEFT + length + 6:.1f}" y="{middle}">{seconds:.1f}</text>',
            ]
            top += _BAR + _GAP
        top += _BETWEEN
    size = f'width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}"'
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style} role="img" aria-label="Seconds of every job">\n'
        f'<rect width="{_WIDTH}" height="{top}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )

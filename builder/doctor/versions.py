"""MLflow: reachable, searched by tag, and written to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from builder.doctor import Finding, ok, skipped, warn
from builder.errors import BuilderError
from builder.models.abilities import check_tagging, filters_by_tag, server_version

if TYPE_CHECKING:
    from builder.doctor.surroundings import Surroundings


def server(around: Surroundings) -> Finding:
    """See whether MLflow answers, and searches by the target tag."""
    catalog, tag = around.catalog, around.settings.target_tag
    version = server_version(catalog)
    who = f"MLflow{f' {version}' if version else ''} answers at {catalog.server}"
    if not filters_by_tag(catalog, tag):
        what = f"{who}, and cannot search by the tag {tag}: each sweep lists every version."
        return warn(what, "Use a release of MLflow that searches model versions by their tags, for many versions.")
    return ok(f"{who}, and {'has' if around.sample() else 'has no'} versions with {tag}.")


def tags(around: Surroundings) -> Finding:
    """See whether the outcome can be written to a version; nothing is written."""
    try:
        version = around.sample()
    except BuilderError:
        return skipped("MLflow does not answer: see its row.")
    if version is None:
        what = f"No version carries {around.settings.target_tag}, so there is none to try it with."
        return skipped(what, "Look again when a version is tagged.")
    check_tagging(around.catalog, version)
    return ok(f"Tags of {version} may be written.")

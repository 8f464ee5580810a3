"""What of MLflow an image needs to serve a model: its scoring server's part, in place of the whole package.

`mlflow` brings the tracking server, its database and its plots: hundreds of megabytes that serving never imports.
`mlflow-skinny` has the same modules without them; what the scoring server imports beside it is known here for each
release. docs/decisions/0032-serving.md says how that was found out.

Which release it is, only a lock tells: requirements may leave it open, and MLmodel names the one that logged the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from builder.build.mlflow_release import (
    COMES_WITH,
    SETUPTOOLS,
    bounds_of,
    imports_pkg_resources,
    needs_of,
    release_of,
)
from builder.build.requirement import Required
from builder.build.requirements import Requirements

MLFLOW = "mlflow"
SKINNY = "mlflow-skinny"


def for_serving(
    requirements: Requirements, *, full: bool = False, own_client: bool = False, uses: Collection[str] = ()
) -> Requirements:  # fmt: skip
    """Return what to install so that a model can be served.

    Where the model asks for `mlflow`, that becomes `mlflow-skinny` of the same version, with what the scoring server
    imports beside it; the packages that the model's flavor imports are among the requirements that MLflow logged. What
    the model pins by itself stays as it is. `otherwise` of the result keeps the whole package, for a release that
    has no `mlflow-skinny`.

    Args:
        requirements: the model's own.
        full: keep the whole package.
        own_client: the version ships its own server, so that MLflow is not added where the model does not ask for it.
        uses: distributions that the whole package brings, and of which the model's files name modules.
    """
    asked = requirements.named(MLFLOW)
    if own_client and not asked:
        return requirements
    requirements = replace(requirements, serves=True)
    if asked:
        whole = _served(requirements)
        # The hashes that a model names are those of the whole package and of what that requires.
        if full or requirements.require_hashes or any(one.hashes for one in asked):
            return whole
        others = tuple(one for one in requirements.required if one.name != MLFLOW)
        skinny = tuple(_skinny(one, requirements.mlflow_version) for one in asked)
        lean = _served(requirements.with_changes(required=(*others, *skinny)))
        named = {one.name for one in requirements.required if not one.marker}
        left = {name for name in uses if not {name, COMES_WITH.get(name)} & named}
        return replace(lean, otherwise=whole, uses=frozenset(left))
    # A model without either was logged by hand; the server is that of the release that wrote its MLmodel.
    logged = f"=={requirements.mlflow_version}" if requirements.mlflow_version else ""
    added = () if requirements.named(SKINNY) else (Required(name=SKINNY, specifier=logged),)
    return _served(requirements.with_changes(required=(*requirements.required, *added)))


def for_release(requirements: Requirements, locked: Mapping[str, str]) -> Requirements | None:
    """Return what has to be resolved in place of requirements whose lock lacks what its release of MLflow needs.

    MLflow is pinned to the release of the lock, so that what is added is right for what comes of it.

    Args:
        requirements: what was resolved.
        locked: the versions in the lock, by package.

    Returns:
        None where the lock has all that is needed.
    """
    release = locked_release(locked)
    if release is None:
        return None
    changed = _with_needs(requirements, release)
    missing = [one for one in changed.required if one not in requirements.required and one.name not in locked]
    broken = [
        one
        for one in changed.constraints
        if one not in requirements.constraints
        and one.name in locked
        and not SpecifierSet(one.specifier).contains(locked[one.name], prereleases=True)
    ]
    if not missing and not broken:
        return None
    pins = tuple(Required(name=name, specifier=f"=={locked[name]}") for name in (MLFLOW, SKINNY) if name in locked)
    return changed.with_changes(required=changed.required, constraints=pins)


def with_used(
    requirements: Requirements, locked: Mapping[str, str], whole: Mapping[str, str] | None
) -> Requirements:  # fmt: skip
    """Return what has to be resolved in place of requirements whose lock lacks what the model's files name.

    Args:
        requirements: what was resolved.
        locked: the versions in the lock, by package.
        whole: those in the lock of the whole package, as which they are added; None where there is no such lock.
    """
    names = sorted(name for name in requirements.uses if name not in locked and (whole is None or name in whole))
    pins = tuple(Required(name=name, specifier=f"=={whole[name]}" if whole else "") for name in names)
    release = (Required(name=SKINNY, specifier=f"=={locked[SKINNY]}"),)
    changed = requirements.with_changes(required=(*requirements.required, *pins), constraints=release)
    return replace(changed, added=requirements.added | set(names))


def whole_of(requirements: Requirements, locked: Mapping[str, str]) -> Requirements | None:
    """Return the requirements on the whole package, of the release in a lock of its part; None where that is not it.

    Args:
        requirements: what was resolved.
        locked: the versions in the lock, by package.
    """
    if requirements.otherwise is None or SKINNY not in locked or requirements.uses <= locked.keys():
        return None
    release = (Required(name=MLFLOW, specifier=f"=={locked[SKINNY]}"),)
    return requirements.otherwise.with_changes(required=requirements.otherwise.required, constraints=release)


def locked_release(locked: Mapping[str, str]) -> Version | None:
    """Return the release of MLflow in a lock; None for none.

    Args:
        locked: the versions in the lock, by package.
    """
    found = locked.get(MLFLOW) or locked.get(SKINNY)
    return Version(found) if found else None


def _pinned(requirements: Requirements) -> Version | None:
    """Return the release of MLflow that a requirement pins."""
    named = (*requirements.named(MLFLOW), *requirements.named(SKINNY))
    return next((found for one in named if one.pinned and (found := release_of(one.pinned))), None)


def _served(requirements: Requirements) -> Requirements:
    """Return requirements with what their release needs, as far as they pin one; its lock is looked at in any case."""
    return _with_needs(requirements, _pinned(requirements))


def _with_needs(requirements: Requirements, release: Version | None) -> Requirements:
    """Return requirements with what a release needs, in place of what was added for another one."""
    own = tuple(one for one in requirements.required if one.name not in requirements.added)
    everywhere = {one.name for one in own if not one.marker}
    names = needs_of(release) if requirements.serves and MLFLOW not in everywhere else ()
    if release is not None and imports_pkg_resources(release):
        names = (*names, SETUPTOOLS)
    added = tuple(Required(name=name) for name in names if name not in everywhere)
    bounds = tuple(
        Required(name=name, specifier=specifier)
        for name, specifier in bounds_of(release)
        # What a model pins is not bounded; but an MLflow without pkg_resources does not start.
        if name == SETUPTOOLS or (requirements.serves and not requirements.named(name))
    )
    changed = requirements.with_changes(required=(*own, *added), constraints=bounds)
    return replace(changed, added=frozenset(one.name for one in added))


def _skinny(required: Required, logged: str) -> Required:
    """Return the requirement on `mlflow-skinny` that stands for one on `mlflow`.

    Where several releases would do, it is the one that logged the model: the one that is known to read it.
    """
    specifier = required.specifier
    if logged and not required.pinned and SpecifierSet(specifier).contains(logged, prereleases=True):
        specifier = f"=={logged}"
    return replace(required, name=SKINNY, specifier=specifier, hashes=(), url="", path="")

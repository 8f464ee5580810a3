"""What of MLflow an image needs to serve a model: its scoring server's part, in place of the whole package.

`mlflow` brings the tracking server, its database and its plots: hundreds of megabytes that serving never imports.
`mlflow-skinny` has the same modules without them; what the scoring server imports beside it is known here for each
release. docs/decisions/0032-serving.md says how that was found out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion as NotAVersion
from packaging.version import Version

from builder.build.requirement import Required
from builder.build.requirements import Requirements

MLFLOW = "mlflow"
SKINNY = "mlflow-skinny"
# From this release on, MLflow's scoring server is an ASGI application; it was a WSGI one before.
_FIRST_ASGI = Version("2.21")
# The bounds that `mlflow` sets on what serving imports, and `mlflow-skinny` does not: the releases from the first
# version and before the second are bound so. None for any later one.
_BOUNDS = (
    ("2.0", "2.16", "numpy", "<2"),
    ("2.16", "4", "numpy", "<3"),
    ("2.0", "3.16", "pandas", "<3"),
    ("3.16", "4", "pandas", "<4"),
    ("2.0", "4", "flask", "<4"),
    # Starlette 1 has no `route` decorator any more, and no release of MLflow before 3.12 says that it needs it.
    ("2.21", "3.13", "starlette", "<1"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What to install, and what then serves the model.

    Attributes:
        requirements: the model's, with MLflow's part replaced.
        server: module of MLflow's scoring server and its argument: `python -m uvicorn mlflow.…app:app`.
    """

    requirements: Requirements
    server: tuple[str, str]


def for_serving(requirements: Requirements, *, full: bool = False, own_client: bool = False) -> Serving:
    """Return what to install so that a model can be served.

    Where the model asks for `mlflow`, that becomes `mlflow-skinny` of the same version, with what the scoring server
    imports beside it; the packages that the model's flavor imports are among the requirements that MLflow logged. What
    the model pins by itself stays as it is. The result's `requirements.otherwise` keeps the whole package, for a
    release that has no `mlflow-skinny`.

    Args:
        requirements: the model's own.
        full: keep the whole package.
        own_client: the version ships its own server, so that MLflow is not added where the model does not ask for it.
    """
    asked = requirements.named(MLFLOW)
    version = _version(requirements)
    needs = _needs(version, requirements)
    bounds = _bounds(version, requirements)
    whole = requirements.with_changes(required=requirements.required, constraints=bounds)
    if asked:
        if full:
            return Serving(requirements=whole, server=_server(version))
        others = tuple(one for one in requirements.required if one.name != MLFLOW)
        skinny = tuple(_skinny(one, requirements.mlflow_version) for one in asked)
        lean = requirements.with_changes(required=(*others, *skinny, *needs), constraints=bounds)
        return Serving(requirements=replace(lean, otherwise=whole), server=_server(version))
    if own_client:
        return Serving(requirements=requirements, server=_server(version))
    # A model without either was logged by hand; the server is that of the release that wrote its MLmodel.
    logged = f"=={requirements.mlflow_version}" if requirements.mlflow_version else ""
    added = () if requirements.named(SKINNY) else (Required(name=SKINNY, specifier=logged),)
    served = requirements.with_changes(required=(*requirements.required, *added, *needs), constraints=bounds)
    return Serving(requirements=served, server=_server(version))


def _version(requirements: Requirements) -> Version | None:
    """Return the release of MLflow that will be installed, as far as that is known."""
    pinned = next((one.pinned for one in (*requirements.named(MLFLOW), *requirements.named(SKINNY)) if one.pinned), "")
    try:
        return Version(pinned or requirements.mlflow_version)
    except NotAVersion:
        # None at all, or one that `===` names and no index has: the resolver says so.
        return None


def _skinny(required: Required, logged: str) -> Required:
    """Return the requirement on `mlflow-skinny` that stands for one on `mlflow`.

    Where several releases would do, it is the one that logged the model: the one that is known to read it.
    """
    specifier = required.specifier
    if logged and not required.pinned and SpecifierSet(specifier).contains(logged, prereleases=True):
        specifier = f"=={logged}"
    return replace(required, name=SKINNY, specifier=specifier, hashes=(), url="", path="")


def _needs(version: Version | None, requirements: Requirements) -> tuple[Required, ...]:
    asgi = version is None or version >= _FIRST_ASGI
    names = ("pandas", "uvicorn") if asgi else ("pandas", "flask", "gunicorn")
    return tuple(Required(name=name) for name in names if not requirements.named(name))


def _bounds(version: Version | None, requirements: Requirements) -> tuple[Required, ...]:
    if version is None:
        return ()
    return tuple(
        Required(name=name, specifier=specifier)
        for first, end, name, specifier in _BOUNDS
        if Version(first) <= version < Version(end) and not requirements.named(name)
    )


def _server(version: Version | None) -> tuple[str, str]:
    if version is None or version >= _FIRST_ASGI:
        return "uvicorn", "mlflow.pyfunc.scoring_server.app:app"
    return "gunicorn", "mlflow.pyfunc.scoring_server.wsgi:app"

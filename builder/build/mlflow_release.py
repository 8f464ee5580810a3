"""What each release of MLflow needs to serve a model, beside what its packages require by themselves.

docs/decisions/0032-serving.md says how that was found out.
"""

from __future__ import annotations

import re

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

SETUPTOOLS = "setuptools"
WSGI = ("gunicorn", "mlflow.pyfunc.scoring_server.wsgi:app")
ASGI = ("uvicorn", "mlflow.pyfunc.scoring_server.app:app")
# From this release on, MLflow's scoring server is an ASGI application; it was a WSGI one before.
_FIRST_ASGI = Version("2.21")
# Older releases import pkg_resources, which setuptools 81 was the last but one to have, and no release requires.
_FIRST_WITHOUT_PKG_RESOURCES = Version("2.16")
_WITH_PKG_RESOURCES = "<81"
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
# What `mlflow` brings, in any release, and `mlflow-skinny` with pandas does not: distributions by their modules.
# tests/build/test_named_modules.py holds it against the newest release.
BROUGHT = {
    **dict.fromkeys(("matplotlib", "mpl_toolkits", "pylab"), "matplotlib"),
    "PIL": "pillow",
    "attr": "attrs",
    "fontTools": "fonttools",
    "graphql": "graphql-core",
    "sklearn": "scikit-learn",
    **{name.replace("-", "_"): name for name in ("flask-cors", "graphql-relay", "querystring-parser")},
    "prometheus_flask_exporter": "prometheus-flask-exporter",
    **{
        name: name
        for name in (
            *("aiohttp", "alembic", "attrs", "blinker", "contourpy", "cryptography", "cycler", "docker", "entrypoints"),
            *("flask", "graphene", "greenlet", "gunicorn", "huey", "itsdangerous", "jinja2", "joblib", "kiwisolver"),
            *("mako", "markdown", "markupsafe", "multidict", "narwhals", "prettytable", "pyarrow"),
            *("pyparsing", "pytz", "scipy", "skops", "sqlalchemy", "sqlparse", "tabulate", "threadpoolctl"),
            *("waitress", "wcwidth", "werkzeug", "yarl"),
        )
    },
}
# What comes with another one of these wherever that is installed.
COMES_WITH = {"joblib": "scikit-learn", "scipy": "scikit-learn", "threadpoolctl": "scikit-learn"}
# Methods of pandas that import one of these, by their names.
IMPLIED = {
    **dict.fromkeys(("read_parquet", "to_parquet", "read_feather", "to_feather", "read_orc", "to_orc"), "pyarrow"),
    **dict.fromkeys(("read_sql", "read_sql_query", "read_sql_table", "to_sql"), "sqlalchemy"),
}
_RELEASE = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9}){1,9}")


def release_of(text: str) -> Version | None:
    """Return the release that a text names; None for none, or for what is no plain number."""
    return Version(text) if _RELEASE.fullmatch(text) else None


def taken(specifier: str, logged: str) -> Version | None:
    """Return the release that a resolver takes, or one that is served as it is; None for the newest.

    Args:
        specifier: of the requirement, `>=2.10,<3`; what cannot be read leaves the release open.
        logged: the release that logged the model, which is taken where the specifier has it; empty for none.
    """
    try:
        allowed = SpecifierSet(specifier)
    except InvalidSpecifier:
        allowed = SpecifierSet()
    if logged and allowed.contains(logged, prereleases=True):
        return release_of(logged)
    if allowed.contains("999"):
        return None
    ends = (f"{major}.{minor}.99" for major, most in ((3, 99), (2, 22), (1, 30)) for minor in range(most, -1, -1))
    exact = [one.version for one in allowed if one.operator in {"==", "<=", "~="}]
    return max(
        map(Version, (one for one in (*ends, *exact) if release_of(one) and allowed.contains(one))), default=None
    )


def server_of(release: Version | None) -> tuple[str, str]:
    """Return the module of a release's scoring server and its argument; the newest one's for None."""
    return ASGI if release is None or release >= _FIRST_ASGI else WSGI


def imports_pkg_resources(release: Version) -> bool:
    """Return whether a release imports pkg_resources, which setuptools has up to a version."""
    return release < _FIRST_WITHOUT_PKG_RESOURCES


def needs_of(release: Version | None) -> tuple[str, ...]:
    """Return the packages that a release's scoring server imports, and `mlflow-skinny` does not require."""
    if release is None or release >= _FIRST_ASGI:
        return "pandas", "uvicorn"
    return "pandas", "flask", "gunicorn"


def bounds_of(release: Version | None) -> tuple[tuple[str, str], ...]:
    """Return the bounds that a release's server needs: a package and a specifier each; none for None."""
    if release is None:
        return ()
    old = ((SETUPTOOLS, _WITH_PKG_RESOURCES),) if imports_pkg_resources(release) else ()
    bounds = ((name, specifier) for first, end, name, specifier in _BOUNDS if Version(first) <= release < Version(end))
    return (*bounds, *old)

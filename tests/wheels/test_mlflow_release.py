"""What a model is served with follows the release of MLflow in its lock, and nothing that a file says of it."""

import hashlib
from pathlib import Path

import pytest

from builder.errors import InvalidVersion
from builder.model_folder import server_of
from builder.wheels.inputs import for_serving, locked_release
from builder.wheels.lock import Lock
from builder.wheels.requirements import Requirements
from builder.wheels.resolve import lock
from builder.wheels.uv import Unsatisfiable
from tests.package_index.server import running
from tests.wheels.test_resolve import AMD64, ARMV7, GLIBC, asked

OLD = ("1.20.2", "1.30.0", "2.1.1", "2.9.2", "2.15.1")
NEW = ("2.16.2", "2.22.0", "3.17.2")
WSGI = ("gunicorn", "mlflow.pyfunc.scoring_server.wsgi:app")
ASGI = ("uvicorn", "mlflow.pyfunc.scoring_server.app:app")


@pytest.fixture(scope="module")
def index():
    with running() as found:
        for version in OLD + NEW:
            found.add("mlflow-skinny", version)
            found.add("mlflow", version, requires=[f"mlflow-skinny=={version}", "big"])
        for version in ("58.1.0", "80.9.0", "82.0.0"):
            found.add("setuptools", version)
        for version in ("1.26.4", "2.2.0"):
            found.add("numpy", version)
        for name in ("pip", "wheel", "pandas", "flask", "gunicorn", "uvicorn", "starlette", "big"):
            found.add(name, "1.0" if name != "starlette" else "0.40")
        found.add("starlette", "1.0")
        found.add("needs-new", "1.0", requires=["setuptools>=82"])
        yield found


def locked(requirements, index, platform=AMD64, **options):
    found = lock(
        requirements, platform=platform, indexes=asked(index), model=Path("/nonexistent"), python="3.11", glibc=GLIBC
    )
    return found.versions


def served(*lines, logged="", index, full=False, **options):
    return locked(for_serving(Requirements.of(*lines, mlflow_version=logged), full=full), index, **options)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("version", OLD)
def test_an_mlflow_that_imports_pkg_resources_gets_a_setuptools_that_has_it(index, version, full):
    found = served(f"mlflow=={version}", "numpy", logged=version, index=index, full=full)
    assert found["setuptools"] == "80.9.0"


@pytest.mark.parametrize("version", NEW)
def test_a_newer_mlflow_gets_no_setuptools(index, version):
    assert "setuptools" not in served(f"mlflow=={version}", logged=version, index=index)


@pytest.mark.parametrize("platform", [AMD64, ARMV7], ids=["named", "universal"])
@pytest.mark.parametrize("line", ["mlflow<2.16", "mlflow-skinny<2.16", "mlflow>=2,<2.16", "mlflow==2.15.*"])
def test_the_lock_decides_where_the_requirements_leave_the_release_open(index, line, platform):
    found = served(line, logged="3.1.0", index=index, platform=platform)
    assert (found["mlflow-skinny"], found["setuptools"]) == ("2.15.1", "80.9.0")
    assert {"pandas", "flask", "gunicorn"} <= found.keys()
    assert "uvicorn" not in found
    assert server_of(locked_release(found)) == WSGI


def test_a_client_s_own_mlflow_needs_it_too(index):
    requirements = for_serving(Requirements.of("mlflow-skinny<2.16"), own_client=True)
    assert locked(requirements, index) == {"mlflow-skinny": "2.15.1", "setuptools": "80.9.0"}


def test_a_setuptools_that_is_pinned_too_high_is_refused(index):
    with pytest.raises(Unsatisfiable, match=r"setuptools"):
        served("mlflow==2.9.2", "setuptools==82.0.0", index=index)
    assert served("mlflow==2.9.2", "setuptools==58.1.0", index=index)["setuptools"] == "58.1.0"


def test_a_release_that_logged_the_model_is_a_hint_only(index):
    found = served("mlflow>=2.20,<3", "numpy", logged="2.9.2", index=index)
    # Neither the server nor the bounds of 2.9.2.
    assert (found["mlflow-skinny"], found["numpy"]) == ("2.22.0", "2.2.0")
    assert "uvicorn" in found
    assert "gunicorn" not in found
    assert server_of(locked_release(found)) == ASGI


def test_bounds_are_those_of_the_release_in_the_lock(index):
    index.add("fastapi-like", "1.0", requires=["starlette", "numpy"])
    found = served("mlflow>=2.20,<3", "fastapi-like", logged="3.17.2", index=index)
    assert found["starlette"] == "0.40"
    assert served("mlflow<2.16", "fastapi-like", index=index)["numpy"] == "1.26.4"


def test_hashes_are_those_of_the_whole_package(index):
    def line(name, version):
        content = index.files[name][f"{name.replace('-', '_')}-{version}-py3-none-any.whl"][0]
        return f"{name}=={version} --hash=sha256:{hashlib.sha256(content).hexdigest()}"

    lines = ["--require-hashes", line("mlflow", "2.9.2"), line("mlflow-skinny", "2.9.2"), line("big", "1.0")]
    # setuptools is in no such list: the tools that write them leave it out.
    assert set(served(*lines, logged="2.9.2", index=index)) == {"mlflow", "mlflow-skinny", "big", "setuptools"}
    with pytest.raises(InvalidVersion, match="big"):
        served(*lines[:-1], index=index)


def test_mlmodel_that_names_no_release(index):
    found = served("mlflow", index=index)
    assert found["mlflow-skinny"] == "3.17.2"
    assert "uvicorn" in found


def folder(tmp_path, requirements, build):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/MLmodel").write_text("flavors: {}\nmlflow_version: 2.22.0\n")
    (tmp_path / "model/requirements.txt").write_text(requirements)
    lines = "".join(f"- {line}\n" for line in build)
    (tmp_path / "model/python_env.yaml").write_text(
        f"python: 3.11.2\nbuild_dependencies:\n{lines}dependencies:\n- -r requirements.txt\n"
    )
    return for_serving(Requirements.read(tmp_path, "model"))


def test_build_dependencies_belong_to_the_environment(index, tmp_path):
    requirements = folder(tmp_path, "mlflow==2.22.0\n", ["pip==1.0", "setuptools==58.1.0", "wheel"])
    found = locked(requirements, index)
    assert (found["pip"], found["setuptools"], found["wheel"]) == ("1.0", "58.1.0", "1.0")


def test_bare_build_dependencies_of_an_old_release(index, tmp_path):
    requirements = folder(tmp_path, "mlflow==2.9.2\n", ["pip", "setuptools", "wheel"])
    assert locked(requirements, index)["setuptools"] == "80.9.0"


@pytest.mark.parametrize("own", ["setuptools==80.9.0", "needs-new"])
def test_build_dependencies_give_way_to_what_is_installed_after_them(index, tmp_path, own):
    requirements = folder(tmp_path, f"mlflow==2.22.0\n{own}\n", ["pip==1.0", "setuptools==58.1.0"])
    assert locked(requirements, index)["setuptools"] in {"80.9.0", "82.0.0"}


def test_build_dependencies_that_no_index_has_are_left_out(index, tmp_path):
    requirements = folder(tmp_path, "mlflow==2.22.0\n", ["pip==99", "setuptools==58.1.0"])
    assert "pip" not in locked(requirements, index)


@pytest.mark.parametrize("build", [["../../etc/passwd"], ["pip @ git+https://git.example.com/pip"], ["{a: b}"]])
def test_build_dependencies_are_checked_as_requirements_are(tmp_path, build):
    with pytest.raises(InvalidVersion, match=r"python_env\.yaml"):
        folder(tmp_path, "mlflow==2.22.0\n", build)


@pytest.fixture
def bringing():
    """An index whose mlflow brings scikit-learn below 2 and alembic, and whose mlflow-skinny does not."""
    with running() as found:
        for version in ("3.1.0", "3.2.0"):
            found.add("mlflow-skinny", version, requires=["numpy"])
            found.add("mlflow", version, requires=[f"mlflow-skinny=={version}", "scikit-learn<2", "alembic", "pandas"])
        for version in ("1.5.0", "2.0.0"):
            found.add("scikit-learn", version, requires=["joblib", "numpy"])
        for name in ("alembic", "joblib", "numpy", "pandas", "uvicorn", "docker"):
            found.add(name, "1.0")
        yield found


def used(*lines, uses, index, platform=AMD64, **options):
    requirements = for_serving(Requirements.of(*lines, mlflow_version="3.1.0"), uses=uses, **options)
    return lock(
        requirements, platform=platform, indexes=asked(index), model=Path("/nonexistent"), python="3.11", glibc=GLIBC
    )


LEAN = {"mlflow-skinny": "3.1.0", "numpy": "1.0", "pandas": "1.0", "uvicorn": "1.0"}


@pytest.mark.parametrize("platform", [AMD64, ARMV7], ids=["named", "universal"])
def test_what_the_model_s_files_name_is_added_as_the_whole_package_has_it(bringing, platform):
    found = used("mlflow==3.1.0", uses=["scikit-learn", "numpy", "docker"], index=bringing, platform=platform)
    assert found.versions == {**LEAN, "scikit-learn": "1.5.0", "joblib": "1.0"}
    assert found.added == ("scikit-learn",)
    assert Lock.from_text(found.to_text()) == found
    # An open requirement gets what belongs to the release that was taken.
    assert used("mlflow>=3", uses=["alembic"], index=bringing).versions == {**LEAN, "alembic": "1.0"}


def test_nothing_is_added_that_the_model_has_or_that_no_file_names(bringing):
    asked_before = len(bringing.requests)
    assert used("mlflow==3.1.0", uses=[], index=bringing).versions == LEAN
    pages = [path for _, path, _ in bringing.requests[asked_before:]]
    assert "/simple/mlflow/" not in pages
    found = used("mlflow==3.1.0", "scikit-learn", uses=["scikit-learn", "joblib"], index=bringing)
    assert found.versions["scikit-learn"] == "2.0.0"
    assert found.added == ()
    assert used("mlflow==3.1.0", uses=["scikit-learn"], full=True, index=bringing).added == ()
    # Without mlflow in the requirements nothing of it is the model's.
    assert used("numpy", uses=["scikit-learn"], index=bringing).versions == LEAN


def test_where_the_part_cannot_have_it_the_whole_is_taken(bringing):
    bringing.add("mlflow-skinny", "3.9.0", requires=["numpy", "joblib<1"])
    bringing.add("joblib", "0.9")
    bringing.add("mlflow", "3.9.0", requires=["scikit-learn", "numpy", "pandas"])
    bringing.add("scikit-learn", "3.0.0", requires=["joblib>=1"])
    found = used("mlflow==3.9.0", uses=["scikit-learn"], index=bringing)
    assert found.versions["mlflow"] == "3.9.0"
    assert "mlflow-skinny" not in found.versions


def test_where_the_whole_cannot_be_had_any_version_is_added(bringing):
    bringing.add("mlflow-skinny", "3.8.0")
    found = used("mlflow==3.8.0", uses=["scikit-learn"], index=bringing)
    assert found.versions["scikit-learn"] == "2.0.0"
    # And nothing is refused for a name, which may be no module's.
    assert "docker" in used("mlflow==3.8.0", uses=["docker"], index=bringing).versions
    assert used("mlflow==3.8.0", uses=["matplotlib"], index=bringing).added == ()


def test_what_is_used_is_part_of_a_lock_s_key():
    texts = {
        for_serving(Requirements.of("mlflow==3.1.0", *more), uses=uses).to_text()
        for uses, more in (((), ()), (["joblib"], ()), (["joblib", "scipy"], ["scikit-learn"]))
    }
    assert len(texts) == 3
    plain = for_serving(Requirements.of("mlflow==3.1.0", "scikit-learn"))
    named = for_serving(Requirements.of("mlflow==3.1.0", "scikit-learn"), uses=["joblib", "scikit-learn"])
    assert plain.to_text() == named.to_text()

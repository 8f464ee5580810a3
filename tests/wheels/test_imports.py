"""What a model's files import is in its image: added where it comes with the whole mlflow, refused where nobody has it."""

from __future__ import annotations

import pickle
import sys
import tarfile
import types

import cloudpickle
import pytest

from builder import report
from builder.errors import ExitCode, InvalidVersion
from builder.models import context
from builder.publish import plan as preview
from builder.publish import publish
from builder.settings import Settings
from tests.package_index.server import running
from tests.publish.test_prepare import downloads
from tests.servers.small import push_base
from tests.versions import register

MLMODEL = """\
flavors:
  python_function:
    loader_module: mlflow.pyfunc.model
    python_version: 3.11.2
    python_model: python_model.pkl
"""
NO_CLIENT = {"MODEL_ENTRY_POINT": ""}


@pytest.fixture(scope="module")
def packages():
    """An index with what MLflow's server needs, with what the whole of it brings, and with modules of other names."""
    with running() as index:
        index.add("mlflow-skinny", "3.1.0", requires=["cloudpickle"])
        index.add("mlflow", "3.1.0", requires=["mlflow-skinny==3.1.0", "pandas", "scikit-learn<2"])
        for name in ("cloudpickle", "pandas", "uvicorn"):
            index.add(name, "1.0")
        index.add("scikit-learn", "1.5.0", files={"sklearn/__init__.py": b""}, requires=["joblib"])
        index.add("scikit-learn", "2.0.0", files={"sklearn/__init__.py": b""})
        index.add("joblib", "1.0")
        # Its directory is larger than what is read of it first.
        many = {f"much/{'x' * 100}{number}.py": b"" for number in range(600)}
        index.add("with-another-name", "1.0", files={"pre_processor/__init__.py": b"", **many})
        index.add("with-one-file", "1.0", files={"pre_processor.cpython-311-x86_64-linux-gnu.so": b""})
        index.add("with-a-path", "1.0", files={"with-a-path.pth": b"/opt/elsewhere\n"})
        index.add("with-a-harmless-path", "1.0", files={"distutils-precedence.pth": b"", "a-nspkg.pth": b""})
        yield index


@pytest.fixture
def environ(small_environ, packages):
    """Return the environment of a publisher that knows these packages."""
    return lambda model, **changes: small_environ(model, UV_DEFAULT_INDEX=packages.simple, **changes)


@pytest.fixture
def logged(mlflow_server):
    """Register a version without a client whose python_model.pkl is given."""

    def make(content, requirements="", files=None, tags=NO_CLIENT):
        everything = {
            "mymodel/MLmodel": MLMODEL,
            "mymodel/python_model.pkl": content,
            "mymodel/requirements.txt": f"mlflow==3.1.0\n{requirements}",
            "mymodel/large.bin": "x" * 5000,
            **(files or {}),
        }
        return register(mlflow_server.uri, everything, tags)

    return make


@pytest.fixture(scope="module")
def preprocessing():
    """A pickle of an object of a module that is here alone."""
    module = types.ModuleType("pre_processor.steps")
    module.PreProcessor = type("PreProcessor", (), {"__module__": module.__name__})
    sys.modules.update({"pre_processor": types.ModuleType("pre_processor"), module.__name__: module})
    try:
        return pickle.dumps([module.PreProcessor(), 1])
    finally:
        del sys.modules["pre_processor"], sys.modules[module.__name__]


def test_a_module_that_is_nowhere_is_refused_before_the_weights_are_downloaded(
    logged, environ, mlflow_server, preprocessing
):
    model = logged(preprocessing, "with-a-harmless-path\n")
    for function in (preview, publish):
        got, error = downloads(mlflow_server, environ(model), function)
        assert error.exit_code == ExitCode.DATA
        assert "mymodel/python_model.pkl names the module 'pre_processor.steps'" in error.what
        assert "linux/" in error.what
        assert "code_paths" in error.remedy
        assert "mymodel/python_model.pkl" in got
        assert "mymodel/large.bin" not in got
    assert "pre_processor.steps" in model.outcome()["error"]


def test_a_missing_loader_is_refused(logged, environ):
    files = {"mymodel/MLmodel": MLMODEL.replace("mlflow.pyfunc.model", "our_loader")}
    # The model's own folder is on no path, and nor is one that `code` does not name.
    for beside in ({}, {"mymodel/our_loader.py": "x = 1\n"}, {"mymodel/code/our_loader.py": "x = 1\n"}):
        with pytest.raises(InvalidVersion, match="'our_loader'"):
            publish(Settings.from_environ(environ(logged(pickle.dumps(1), files={**files, **beside}))))
    files["mymodel/MLmodel"] += "    code: code\n"
    files["mymodel/code/our_loader.py"] = "x = 1\n"
    assert publish(Settings.from_environ(environ(logged(pickle.dumps(1), files=files)))).changed


INNOCENT = {
    "in a wheel of another name": {"requirements": "with-another-name\n"},
    "a file of a wheel": {"requirements": "with-one-file\n"},
    "perhaps on a path": {"requirements": "with-a-path\n"},
    "in the code": {"files": {"mymodel/code/pre_processor/steps.py": ""}},
    "a file in the code": {"files": {"mymodel/code/lib/pre_processor.py": ""}},
    "a client's business": {"files": {"client/app.py": ""}, "tags": {}},
}


@pytest.mark.parametrize("why", INNOCENT)
def test_a_module_that_may_be_there_is_not_refused(logged, environ, preprocessing, why):
    assert publish(Settings.from_environ(environ(logged(preprocessing, **INNOCENT[why])))).changed


def test_a_module_that_cannot_be_checked_is_not_refused(logged, environ, preprocessing, registry, packages, caplog):
    caplog.set_level("INFO", "builder.wheels")
    base = push_base(registry.host, "base/with-path:3.11", config={"Env": ["PYTHONPATH=/opt/site"]})
    assert publish(Settings.from_environ(environ(logged(preprocessing), BASE_IMAGE=base))).changed
    assert "a module may be missing" not in caplog.text

    def whole(handler, path):
        """Give no part of a file."""
        del handler.headers["Range"]
        return False

    packages.faults = whole
    try:
        assert publish(Settings.from_environ(environ(logged(preprocessing)))).changed
    finally:
        packages.faults = None
    assert "a module may be missing" in caplog.text


SCALING = """
class Scaling:
    def predict(self, context, rows, params=None):
        from sklearn.preprocessing import scale
        return scale(rows).tolist()
"""


def by_value(source, name, padding=b""):
    """Return the pickle of an object whose class stands in no module, as one of a notebook's."""
    made = {"__name__": "__main__"}
    exec(source, made)  # a test's own
    return cloudpickle.dumps([made[name](), padding])


def test_what_a_method_imports_is_added_and_told(logged, environ, caplog):
    caplog.set_level("INFO")
    model = logged(by_value(SCALING, "Scaling"))
    settings = Settings.from_environ(environ(model))
    note = (
        "added scikit-learn 1.5.0, which comes with the whole mlflow: "
        "mymodel/python_model.pkl names sklearn.preprocessing"
    )
    planned = preview(settings)
    assert {step.notes for step in planned.platforms} == {(note,)}
    assert note in report.plan(planned, engine="none", push_checked=False, smoke_test="off")
    missing = {name.partition("-")[0] for name in planned.platforms[0].layers.missing}
    assert missing == {"cloudpickle", "mlflow_skinny", "pandas", "uvicorn", "scikit_learn", "joblib"}
    assert publish(settings).changed
    assert note in caplog.text
    # The lock is kept, with what was added.
    caplog.clear()
    planned = preview(settings, rebuild=True)
    assert planned.platforms[0].notes == (note,)
    assert planned.platforms[0].layers.missing == ()
    assert "resolving" not in caplog.text


def test_imports_of_the_standard_library_add_no_package(logged, environ):
    planned = preview(Settings.from_environ(environ(logged(by_value(SCALING.replace("sklearn", "json"), "Scaling")))))
    assert planned.platforms[0].notes == ()
    assert not any(name.startswith("scikit") for name in planned.platforms[0].layers.missing)


def test_a_client_s_imports_count(logged, environ):
    files = {"client/app.py": "import sklearn\n"}
    planned = preview(Settings.from_environ(environ(logged(pickle.dumps(1), files=files, tags={}))))
    assert planned.platforms[0].notes[0].endswith("client/app.py names sklearn")


def test_a_large_pickle_is_read_when_it_is_downloaded(
    logged, environ, monkeypatch, caplog, preprocessing, crane, tmp_path
):
    monkeypatch.setattr(context, "_MOST_NAMING", 1000)
    caplog.set_level("INFO")
    model = logged(by_value(SCALING, "Scaling", padding=b"x" * 2000))
    settings = Settings.from_environ(environ(model))
    (note,) = preview(settings).platforms[0].notes
    assert note.startswith("mymodel/python_model.pkl is read once downloaded")
    published = publish(settings)
    assert "added scikit-learn 1.5.0" in caplog.text
    crane("export", "--platform", "linux/amd64", str(published.reference), str(tmp_path / "image.tar"))
    with tarfile.open(tmp_path / "image.tar") as image:
        assert "opt/model/lib/python3.11/site-packages/sklearn/__init__.py" in image.getnames()
    model = logged(preprocessing + b"x" * 2000)
    with pytest.raises(InvalidVersion, match=r"pre_processor\.steps"):
        publish(Settings.from_environ(environ(model)))

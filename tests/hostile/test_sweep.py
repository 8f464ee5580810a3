"""Twenty hostile versions between two good ones: both good ones are published, and every other says why it is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from builder.batch.sweep import sweep
from builder.batch.warm import warm
from builder.settings import CatalogSettings, Settings
from scripts.launch import clean_environ
from tests.hostile.test_children import PATIENT
from tests.package_index.server import running
from tests.servers.small import small_files
from tests.versions import Registered, register
from tests.waiting import LONG_HANG

BUDGET = {
    "VERSION_TIMEOUT": "240",
    "VERSION_PROCESSOR_TIME": "10",
    "VERSION_MEMORY": "1GiB",
    "VERSION_BYTES": "64MiB",
    "VERSION_FILES": "60",
}
PATIENT_SWEEP = f"""
import sys
from builder import __main__, batch
batch._START = {PATIENT!r}
sys.argv = ["builder", "sweep"]
__main__.main()
"""
NO_REQUIREMENTS = {"mymodel/requirements.txt": None}
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n  k{n}: 1\n" for n in range(1, 9)
)
LEVELS = "[console_scripts]\n" + "".join(
    f"x{n} = {f'%(x{n - 1})s' * 10 if n else 'a:b'}\n" for n in range(10)
)  # fmt: skip


def requirements(text):
    return {"mymodel/requirements.txt": text}


# What each version has instead of what a good one has: files, tags.
HOSTILE: dict[str, tuple[dict, dict]] = {
    "brackets in conda.yaml": ({**NO_REQUIREMENTS, "mymodel/conda.yaml": "[" * 100_000}, {}),
    "aliases in conda.yaml": ({**NO_REQUIREMENTS, "mymodel/conda.yaml": ALIASES + "dependencies: *a8\n"}, {}),
    "merge keys in conda.yaml": ({**NO_REQUIREMENTS, "mymodel/conda.yaml": MERGES + "dependencies: *a8\n"}, {}),
    "brackets in python_env.yaml": (
        {**NO_REQUIREMENTS, "mymodel/python_env.yaml": "dependencies: " + "[" * 100_000},
        {},
    ),
    "brackets in MLmodel": ({"mymodel/MLmodel": "flavors: " + "[" * 100_000}, {}),
    "a variant of millions": ({}, {"MODEL_PLATFORMS": "linux/arm/v99999999999"}),
    "a platform of 4000 letters": ({}, {"MODEL_PLATFORMS": "linux/" + "a" * 4000}),
    "one long line": (requirements("a" * 80_000), {}),
    "many options": (requirements("small-app " + "-U " * 349_000), {}),
    "a long number": (requirements(f"small-app=={'9' * 5000}"), {}),
    "a version that is none": (requirements("mlflow===foo"), {}),
    "a file of the publisher": (requirements("-r ../../../../../etc/passwd"), {}),
    "31 MiB of metadata": (requirements("much-metadata==1.0"), {}),
    "levels of entry points": (requirements("many-levels==1.0"), {}),
    "a control character": ({}, {}),
    "many files": ({f"mymodel/{number}.txt": "x" for number in range(70)}, {}),
    "a folder outside": ({}, {"MODEL_CLIENT_FOLDER": "../../etc"}),
    "an endless template": (
        {"templates/Dockerfile.j2": "FROM scratch\n{% for a in range(99999) %}{% for b in range(99999) %}{{ 9**99 }}"
         "{% endfor %}{% endfor %}\n"},
        {},
    ),
    "a stage that is none": ({"templates/Dockerfile.template": "FROM scratch\nCOPY --from=² /a /b\n"}, {}),
    "odd $(id) \u202e `name` -rf": (requirements("mlflow===foo"), {}),
}  # fmt: skip


@pytest.fixture
def index(packages):
    with running() as index:
        index.files.update({name: packages.files[name] for name in ("small-app", "small-lib")})
        index.add("much-metadata", "1.0", requires=["x" * (31 << 20)])
        index.add("many-levels", "1.0", files={"many_levels-1.0.dist-info/entry_points.txt": LEVELS.encode()})
        yield index


@pytest.fixture
def environ(mlflow_server, registry, index, tiny_base, request, tmp_path):
    name = f"T{abs(hash(request.node.nodeid)):X}"
    return {
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": f"{registry.host}/hostile-{name.lower()}",
        "TARGET_TAG": f"EXTERNAL_TARGET_{name}",
        "BASE_IMAGE": tiny_base,
        "UV_DEFAULT_INDEX": index.simple,
        "BUILDER_WORKSPACE": str(tmp_path / "workspace"),
        # Nobody is there, so that nobody is asked by mistake.
        "MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.2:9",
        **{f"AWS_{name}": "test-test" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION")},
        **BUDGET,
    }


@pytest.fixture
def new(mlflow_server, environ):
    def make(name, files=None, tags=None):
        tags = {"EXTERNAL_TARGET_PLTR_FOUNDRY": "false", environ["TARGET_TAG"]: "true", **(tags or {})}
        name = f"{name} {environ['TARGET_TAG'][-8:]}"
        return register(mlflow_server.uri, small_files(**(files or {})), tags, name=name)

    return make


def states(results):
    return {result.version.name.rpartition(" ")[0]: result.state for result in results}


def test_twenty_hostile_versions_between_two_good_ones(environ, new, crane, mlflow_server):
    first = new("a good one")
    hostile = {name: new(f"m {name}", *given) for name, given in HOSTILE.items()}
    hostile["artifacts elsewhere"] = elsewhere(mlflow_server, environ)
    last = new("z good one")
    # MLflow's client would escape it on its way to the server.
    odd = hostile["a control character"]
    (folder,) = Path(mlflow_server.artifacts).glob(f"*/{odd.run_id}/artifacts/mymodel")
    (folder / "evil\x1b[2J\u202e\a.txt").touch()
    assert len(hostile) >= 20
    settings = Settings.from_environ(environ)

    results = list(sweep(settings))

    found = states(results)
    assert [*found][:: len(found) - 1] == ["a good one", "z good one"]
    assert Counter(found.values()) == {"published": 2, "failed": len(hostile)}, found
    assert found["a good one"] == found["z good one"] == "published"
    for model in (first, last):
        assert "PASS" in crane("validate", "--remote", model.outcome(settings.target)["image"])
    for name, model in hostile.items():
        outcome = model.outcome(settings.target)
        assert (name, outcome["state"]) == (name, "failed")
        assert min(outcome["error"]) >= " ", name
        assert len(outcome["error"]) > 20, name
        assert int(outcome["attempts"]) <= 1, name
    assert all(result.exit_code for result in results if result.state == "failed")
    # What crashes is no reason to try it for ever.
    assert hostile["brackets in conda.yaml"].outcome(settings.target)["attempts"] == "1"


def elsewhere(mlflow_server, environ):
    """Register a version whose artifacts are said to be in an object store; nobody is there."""
    client = MlflowClient(mlflow_server.uri)
    name = f"m artifacts elsewhere {environ['TARGET_TAG'][-8:]}"
    client.create_registered_model(name)
    version = client.create_model_version(
        name, source="s3://other-teams-bucket/private", tags={environ["TARGET_TAG"]: "true"}
    )
    return Registered(client, name, str(version.version), "")


def test_a_crash_is_one_attempt_whether_or_not_its_start_was_recorded(environ, new):
    """A budget that nothing fits into ends the child before it has recorded anything, and in the midst."""
    model = new("small")
    settings = Settings.from_environ({**environ, "VERSION_FILES": "1", "SWEEP_ATTEMPTS": "3"})
    quick = settings.model_copy(update={"version_timeout": 0})
    for attempt in (1, 2):
        (result,) = sweep(quick)
        assert (result.state, result.exit_code) == ("failed", 65)
        outcome = model.outcome(settings.target)
        assert (outcome["state"], outcome["attempts"]) == ("failed", str(attempt))
        assert "VERSION_TIMEOUT" in outcome["error"]
    # This one records its start.
    (result,) = sweep(settings)
    assert "VERSION_FILES" in model.outcome(settings.target)["error"]
    assert model.outcome(settings.target)["attempts"] == "3"
    assert [result.state for result in sweep(settings)] == ["waiting"]


def test_tags_that_lie_about_attempts_hurt_their_own_version_alone(environ, new):
    target = CatalogSettings.from_environ(environ).target
    lying = {
        "a many": {"attempts": "999", "state": "failed"},
        "b negative": {"attempts": "-5", "state": "running"},
        "c digits": {"attempts": "9" * 4000, "state": "failed", "wanted": "," * 4000},
        "d published": {"state": "published", "tag": "x", "platforms": "linux/amd64", "source": "0" * 64},
    }
    for name, tags in lying.items():
        new(name, tags={f"publish.{target}.{tag}": value for tag, value in tags.items()})
    new("e good", tags={f"tag {number}": "x" for number in range(500)})
    assert states(sweep(Settings.from_environ(environ))) == dict.fromkeys([*lying, "e good"], "published")


def test_a_request_to_end_is_no_attempt(environ, new, index):
    """The sweep hands it on, the version says so, and the sweep ends with 75."""
    model = new("slow", requirements("small-app==1.0"))
    asked, release = threading.Event(), threading.Event()

    def hang(_handler, _path):
        asked.set()
        release.wait(LONG_HANG)
        return False

    index.faults = hang
    run = subprocess.Popen(
        [sys.executable, "-c", PATIENT_SWEEP],
        env=clean_environ(**environ, LOG_FORMAT="json", PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert asked.wait(LONG_HANG)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=LONG_HANG)
    finally:
        release.set()
    assert run.returncode == 75, said
    outcome = model.outcome(CatalogSettings.from_environ(environ).target)
    assert (outcome["state"], outcome["attempts"]) == ("failed", "0")
    assert outcome["error"].startswith("Terminated")


def test_a_hostile_version_does_not_stop_builder_warm(environ, new):
    new("a good one")
    new("b brackets", HOSTILE["brackets in conda.yaml"][0])
    new("c good one")
    results = list(warm(Settings.from_environ(environ)))
    assert [result.state for result in results] == ["warm", "failed", "warm"]
    assert results[1].exit_code == 65

"""examples/domino/publish_hook.py: one file, on the oldest Python that can be had, in each of its ways."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builder.cluster import job as ours
from builder.errors import ExitCode
from builder.models import INPUT_TAGS, ModelVersion
from builder.models.catalog import MlflowCatalog
from tests.hook.conftest import ROOT
from tests.hook.kubernetes import Api, serving
from tests.hook.responder import IMAGE, PUBLISHED, SECRET
from tests.waiting import LONG_HANG

FILE = ROOT / "examples" / "domino" / "publish_hook.py"
OLDEST = (3, 9)
ODD = ["pump", "Modell für Pumpe 7", "日本語", "a/b c:d", "--", "x" * 300, "A.B_c-", "0" * 63 + "-", "ﬁ Ⅷ ½", "\0\n"]
NAMES = st.one_of(st.sampled_from(ODD), st.text(st.characters(codec="utf-8"), min_size=1))


def templates():
    """Return the CronJobs of k8s/ that are templates."""
    files = [ROOT / "k8s" / "base" / "publish-wheels.yaml", *(ROOT / "k8s" / "dockerfile").glob("*.yaml")]
    found = [each for path in files for each in yaml.safe_load_all(path.read_text())]
    return [each for each in found if each and each["kind"] == "CronJob" and "publish" in each["metadata"]["name"]]


@pytest.fixture(scope="module")
def hook():
    """The file as a module, as a notebook imports it."""
    spec = importlib.util.spec_from_file_location("publish_hook", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["publish_hook"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["publish_hook"]


@pytest.fixture(params=["3.9", "own"])
def python(request):
    """An interpreter: the oldest that is promised, and this one."""
    if request.param == "own":
        return sys.executable
    return str(request.getfixturevalue("interpreters") / request.param / "bin" / f"python{request.param}")


@pytest.fixture
def run(python, tmp_path):
    """Run the file as a process with an environment of its own."""

    def call(*arguments, **environ):
        done = subprocess.run(
            [python, "-I", "-B", str(FILE), *arguments],
            check=False, text=True, capture_output=True, cwd=tmp_path, timeout=LONG_HANG,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environ},
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return call


def raw(version):
    """Return a version as MLflow's REST API gives it."""
    return {
        "name": version.name,
        "version": version.version,
        "creation_timestamp": version.created_ms,
        **({"source": version.source} if version.source else {}),
        **({"run_id": version.run_id} if version.run_id else {}),
        "tags": [{"key": key, "value": value} for key, value in version.tags.items()],
    }


# ---- the same as the program


def test_it_is_one_file_of_the_oldest_python_s_standard_library():
    tree = ast.parse(FILE.read_text(), feature_version=OLDEST)
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)


@given(
    name=NAMES,
    number=st.integers(1, 10**9).map(str),
    target=st.sampled_from(["pltr_foundry", "x" * 200, "--", "a.b"]),
    source=st.sampled_from(["", "models:/m-1", "mlflow-artifacts:/0/ä"]),
    tags=st.dictionaries(st.sampled_from([*INPUT_TAGS, "other"]), st.text(max_size=5)),
)
def test_a_job_is_the_one_that_the_program_makes(hook, name, number, target, source, tags):
    version = ModelVersion(name=name, version=number, created_ms=1_700_000_000_123, source=source, tags=tags)
    for template in templates():
        assert hook.job_of(template, raw(version), target) == ours.job_of(template, version, target=target)


def test_the_templates_are_those_of_the_program(hook):
    assert hook.TEMPLATES == ours.TEMPLATES
    assert {each["metadata"]["name"] for each in templates()} == set(hook.TEMPLATES.values())


def test_a_version_is_read_from_mlflow_as_the_program_reads_it(hook, small, mlflow_server):
    version = small(name="Modell für Pumpe 9", tags={"MODEL_FOLDER": "mymodel"})
    there = hook.Mlflow({"MLFLOW_TRACKING_URI": mlflow_server.uri})
    found = MlflowCatalog(mlflow_server.uri).find(version.name, version.version)
    version.client.set_registered_model_alias(version.name, "champion", version.version)
    for asked in (version.version, "@champion"):
        assert hook.source_id(there.find(version.name, asked)) == found.source_id()


@pytest.mark.parametrize(
    ("tag", "target"), [("EXTERNAL_TARGET_PLTR_FOUNDRY", "pltr_foundry"), ("Mine", "mine"), ("EXTERNAL_TARGET_", "")]
)
def test_a_target_has_the_program_s_name(hook, tag, target):
    assert hook.target_of(tag) == (target or tag.lower())


# ---- which version


def test_the_newest_selected_version_of_this_run_is_taken(domino, train, python, responder):
    name = domino.root.parent.name  # its own for each interpreter
    other = domino.ended(domino.start(train(name)))
    assert other.status == "Succeeded", other.output
    domino.environ |= {"LISTENER_URL": responder.url, "SUBMIT_SECRET": SECRET, "PATH": "/usr/bin:/bin"}
    several = " && ".join([train(name), train(name, "", "false")])
    run = domino.ended(domino.start(f"{several} && {python} -I {FILE} --result result.json"))
    assert run.status == "Succeeded", run.output
    assert responder.taken[0] == ("/publish", {"model": name, "version": "2"})
    assert run.output.strip().splitlines()[-1] == IMAGE
    assert (run.columns["state"], run.columns["platforms"]) == ("published", "linux/amd64,linux/arm64")
    assert run.columns["digest"] == IMAGE.partition("@")[2]
    result = json.loads((domino.root / "result.json").read_text())
    assert (result["how"], result["version"], result["exit_code"]) == ("listener", "2", 0)
    sent = {name.lower() for headers in domino.mlflow_asked for name in headers}
    assert not sent & {"authorization", "x-domino-api-key"}


def test_a_run_that_selected_nothing_says_so(run, small, mlflow_server, tmp_path):
    version = small(tags={"EXTERNAL_TARGET_PLTR_FOUNDRY": "no"})
    done = run(
        MLFLOW_TRACKING_URI=mlflow_server.uri, MLFLOW_RUN_ID=version.run_id, DOMINO_WORKING_DIR=str(tmp_path)
    )  # fmt: skip
    assert done.returncode == ExitCode.NO_INPUT
    assert version.name in done.stderr
    columns = json.loads((tmp_path / "dominostats.json").read_text())
    assert (columns["state"], columns["exit_code"]) == ("failed", 66)


# ---- the listener


def test_it_asks_a_listener_and_follows(run, responder, tmp_path):
    running = {"state": "running"}
    responder.outcomes = [running, PUBLISHED]
    (tmp_path / "dominostats.json").write_text('{"AUC": 0.98}')
    listener = {
        "LISTENER_URL": responder.url,
        "SUBMIT_SECRET": f"{SECRET} another",
        "DOMINO_WORKING_DIR": str(tmp_path),
    }
    done = run("pump", "@champion", **listener)
    assert (done.returncode, done.stdout) == (0, f"{IMAGE}\n"), done.stderr
    assert responder.taken[0] == ("/publish", {"model": "pump", "version": "@champion"})
    columns = json.loads((tmp_path / "dominostats.json").read_text())
    assert (columns["AUC"], columns["image"]) == (0.98, IMAGE)
    assert "by listener as publish-pump-v3-0123456789; not here: No `builder` program" in done.stderr
    assert SECRET not in done.stderr


def test_a_job_is_followed_for_the_time_that_is_given(run, responder, tmp_path):
    responder.outcomes = [{"state": "running"}]
    listener = {"LISTENER_URL": responder.url, "SUBMIT_SECRET": SECRET}
    done = run("pump", "3", "--timeout", "0.1", "--result", "r.json", **listener)
    assert done.returncode == ExitCode.TEMPORARY, done.stderr
    assert "publish-pump-v3-0123456789 has not ended after 0.1 s, and goes on" in done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["state"] == "running"


def test_a_failure_of_the_publisher_s_is_its_own(run, responder, tmp_path):
    responder.outcomes = [{"state": "failed", "error": "No such folder.", "remedy": "Add it.", "exit_code": 65}]
    done = run("pump", "3", "--result", "r.json", LISTENER_URL=responder.url, SUBMIT_SECRET=SECRET)
    assert (done.returncode, done.stdout) == (ExitCode.DATA, "")
    assert "what to do: Add it." in done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["state"], result["error"], result["exit_code"]) == ("failed", "No such folder.", 65)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((401, None, {}), ExitCode.NO_PERMISSION),
        ((404, None, {}), ExitCode.CONFIG),
        ((302, None, {"Location": "http://elsewhere.example/"}), ExitCode.CONFIG),
        ((422, {"error": "No.", "remedy": "Look.", "exit_code": 65}, {}), ExitCode.DATA),
    ],
)
def test_each_refusal_has_its_code(run, responder, answer, code):
    responder.special = lambda _path, _number: answer
    done = run("pump", "3", "--how", "listener", LISTENER_URL=responder.url, SUBMIT_SECRET=SECRET)
    assert done.returncode == code, done.stderr


def test_a_request_that_was_refused_for_a_moment_is_repeated_under_another_id(run, responder):
    responder.special = lambda _path, number: (503, None, {}) if number < 3 else None
    done = run("pump", "3", LISTENER_URL=responder.url, SUBMIT_SECRET=SECRET)
    assert done.returncode == 0, done.stderr
    assert len(set(responder.ids)) == len(responder.ids)


def test_where_no_way_is_possible_each_says_why(run, tmp_path):
    done = run("pump", "3", DOMINO_WORKING_DIR=str(tmp_path))
    assert done.returncode == ExitCode.CONFIG
    for why in ("BUILDER_PACKAGE", "LISTENER_URL and SUBMIT_SECRET are missing", "KUBE_API_URL"):
        assert why in done.stderr
    assert json.loads((tmp_path / "dominostats.json").read_text())["state"] == "failed"


def test_a_wrong_command_line_is_a_usage_error(run):
    assert run("--how", "guess").returncode == ExitCode.USAGE
    assert run("--help").returncode == 0


def test_a_notebook_calls_it(hook, responder, tmp_path):
    environ = {"LISTENER_URL": responder.url, "SUBMIT_SECRET": SECRET}
    found = hook.publish("pump", 3, environ=environ)
    assert (found["image"], found["how"], found["platforms"]) == (IMAGE, "listener", ["linux/amd64", "linux/arm64"])
    responder.outcomes = [{"state": "failed", "error": "No.", "exit_code": 65}]
    with pytest.raises(hook.HookError) as caught:
        hook.publish("pump", 3, environ=environ, result=tmp_path / "r.json")
    assert caught.value.code == 65
    assert caught.value.result["state"] == json.loads((tmp_path / "r.json").read_text())["state"] == "failed"


def test_a_broken_stats_file_is_left_as_it_is(run, responder, tmp_path):
    (tmp_path / "dominostats.json").write_text("[1]")
    done = run(
        "pump", "3", LISTENER_URL=responder.url, SUBMIT_SECRET=SECRET, DOMINO_WORKING_DIR=str(tmp_path)
    )  # fmt: skip
    assert done.returncode == 0
    assert "left as it is" in done.stderr
    assert (tmp_path / "dominostats.json").read_text() == "[1]"


# ---- here


def test_a_program_that_is_there_publishes_here(domino, with_registry, small):
    version = small()
    domino.environ["BUILDER_PROGRAM"] = str(Path(sys.executable).parent.parent)
    run = domino.ended(domino.start(f"{sys.executable} -I {FILE} {version.name} {version.version}"))
    assert run.status == "Succeeded", run.output
    image = version.outcome()["image"]
    assert run.output.strip().splitlines()[-1] == run.columns["image"] == image
    assert "by here" not in run.output or "here)" in run.output


def test_what_is_not_possible_here_goes_to_the_listener(domino, with_registry, small, responder):
    version = small(files={"templates/Dockerfile.template": "FROM scratch\n"})
    domino.environ |= {"LISTENER_URL": responder.url, "SUBMIT_SECRET": SECRET}
    domino.environ["BUILDER_PROGRAM"] = str(Path(sys.executable).with_name("builder"))
    run = domino.ended(domino.start(f"{sys.executable} -I {FILE} {version.name} {version.version}"))
    assert run.status == "Succeeded", run.output
    assert run.columns["image"] == IMAGE
    assert "has a Dockerfile" in run.output


def test_a_registry_that_is_not_trusted_here_is_left_to_the_listener(
    domino, with_registry, small, tls_registry, responder
):
    version = small()
    domino.environ |= {"LISTENER_URL": responder.url, "SUBMIT_SECRET": SECRET}
    domino.environ["BUILDER_PROGRAM"] = str(Path(sys.executable).with_name("builder"))
    domino.environ["REGISTRY_URL"] = f"{tls_registry.host}/models"
    run = domino.ended(domino.start(f"{sys.executable} -I {FILE} {version.name} {version.version}"))
    assert (run.status, run.columns["image"]) == ("Succeeded", IMAGE), run.output
    assert "not here: " in run.output


def test_another_program_of_that_name_is_not_taken(run, tmp_path, responder):
    other = tmp_path / "builder"
    other.write_text("#!/bin/sh\necho something else\n")
    other.chmod(0o755)
    settings = {"LISTENER_URL": responder.url, "SUBMIT_SECRET": SECRET, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert run("pump", "3", **settings).returncode == 0
    done = run("pump", "3", "--how", "here", BUILDER_PROGRAM=str(other))
    assert done.returncode == ExitCode.CONFIG


def test_a_package_that_cannot_be_installed_is_no_way(hook, responder, tmp_path):
    package = tmp_path / "nothing-0.1-py3-none-any.whl"
    package.write_bytes(b"no wheel")
    environ = {"LISTENER_URL": responder.url, "SUBMIT_SECRET": SECRET, "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    environ |= {"BUILDER_PACKAGE": str(package), "REGISTRY_URL": "localhost:1/models"}
    assert hook.publish("pump", 3, environ=environ)["how"] == "listener"
    with pytest.raises(hook.HookError, match="cannot be installed"):
        hook.publish("pump", 3, how="here", environ=environ)


WHEEL = "model_image_builder-0.1-py3-none-any.whl"
# As much of the program as is asked before it publishes, and a result that tells which one ran.
PROGRAM = """\
import json, pathlib, sys
if "--help" in sys.argv:
    print("dominostats.json")
    raise SystemExit
result = {{"state": "published", "image": "{image}", "platforms": [sys.argv[0]], "how": "here"}}
pathlib.Path(sys.argv[sys.argv.index("--result") + 1]).write_text(json.dumps(result))
"""


def wheel(folder, image=IMAGE):
    """Write a wheel whose `builder` says that it published an image, and return its path."""
    path, about = folder / WHEEL, "model_image_builder-0.1.dist-info"
    files = {
        "fake_builder.py": "def main():\n" + textwrap.indent(PROGRAM.format(image=image), "    "),
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: model-image-builder\nVersion: 0.1\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": "[console_scripts]\nbuilder = fake_builder:main\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def with_package(tmp_path, monkeypatch):
    """The environment of a run that installs such a wheel, by this interpreter: no other one is on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    environ = {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "REGISTRY_URL": "localhost:1/models"}
    (tmp_path / "home").mkdir()
    return {**environ, "BUILDER_PACKAGE": str(wheel(tmp_path)), "PIP_NO_INDEX": "1"}


def test_a_package_is_installed_once_until_its_file_changes(hook, with_package, tmp_path):
    first = hook.publish("pump", 3, how="here", environ=with_package)
    assert first["image"] == IMAGE
    (program,) = first["platforms"]
    kept = tmp_path / "home" / ".cache" / "publish-hook"
    assert Path(program).is_relative_to(kept)
    assert kept.stat().st_mode & 0o777 == 0o700
    assert hook.publish("pump", 3, how="here", environ=with_package)["platforms"] == [program]
    assert len(list(kept.iterdir())) == 1
    other = IMAGE.replace("a1", "b2")
    wheel(tmp_path, other)
    # What nobody has begun to use for a day goes.
    (old,) = kept.iterdir()
    os.utime(old, (0, 0))
    assert hook.publish("pump", 3, how="here", environ=with_package)["image"] == other
    assert not old.exists()


def test_a_name_in_an_index_is_kept_for_a_day_and_a_version_for_good(hook, monkeypatch):
    names = ["model-image-builder==0.1.0", "model-image-builder", "https://example.com/b.whl", "builder==0.*"]
    before = list(map(hook.edition, names))
    monkeypatch.setattr(hook.time, "gmtime", lambda: time.struct_time((2100, 1, 1, 0, 0, 0, 0, 1, 0)))
    assert [one == other for one, other in zip(before, map(hook.edition, names), strict=True)] == [True, *[False] * 3]


def test_without_a_home_nothing_is_kept_below_the_temporary_folder(hook, with_package, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    # Somebody else's `builder`, where it was looked for once.
    key = hashlib.sha256(f"{with_package['BUILDER_PACKAGE']}\0{sys.executable}".encode()).hexdigest()[:16]
    planted = temporary / ".cache" / "publish-hook" / key / "bin" / "builder"
    planted.parent.mkdir(parents=True)
    planted.write_text(f"#!{sys.executable}\n{PROGRAM.format(image='planted')}")
    planted.chmod(0o755)
    before = sorted(temporary.rglob("*"))
    with_package.pop("HOME")
    monkeypatch.delenv("HOME")
    done = hook.publish("pump", 3, how="here", environ=with_package)
    assert done["image"] == IMAGE
    assert sorted(temporary.rglob("*")) == before


@pytest.mark.parametrize("what", ["owner", "mode", "link", "file", "above"])
def test_a_folder_that_others_can_change_is_not_used(hook, tmp_path, capsys, what):
    environ = {"HOME": str(tmp_path)}
    kept = hook.kept_folder(environ)
    assert kept == tmp_path / ".cache" / "publish-hook"
    assert kept == hook.kept_folder(environ)
    if what == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root gives a folder away")
        os.chown(kept, 12345, -1)
    elif what == "mode":
        kept.chmod(0o770)
    elif what == "above":
        kept.parent.chmod(0o777)
    elif what == "link":
        kept.rename(tmp_path / "elsewhere")
        kept.symlink_to(tmp_path / "elsewhere")
    else:
        kept.rmdir()
        kept.touch()
    assert hook.kept_folder(environ) is None
    assert f"{kept} is not used" in capsys.readouterr().err


# ---- the Kubernetes API


@pytest.fixture
def kubernetes(small, mlflow_server, tmp_path):
    with serving(templates(), tmp_path) as api:
        version = small(name=f"Modell für {tmp_path.name}")
        api.environ["MLFLOW_TRACKING_URI"] = mlflow_server.uri
        yield api, version


def expected(version, mlflow_server, method="wheels"):
    found = MlflowCatalog(mlflow_server.uri).find(version.name, version.version)
    (template,) = [each for each in templates() if each["metadata"]["name"] == ours.TEMPLATES[method]]
    return ours.job_of(template, found, target="pltr_foundry")


def test_it_makes_the_job_that_the_program_makes(run, kubernetes, mlflow_server):
    api, version = kubernetes
    done = run(version.name, version.version, **api.environ)
    assert (done.returncode, done.stdout) == (0, f"{IMAGE}\n"), done.stderr
    body = expected(version, mlflow_server)
    assert api.created == [body]
    assert f"by cluster as {body['metadata']['name']}" in done.stderr


def test_a_version_with_a_dockerfile_has_the_other_template(run, kubernetes, mlflow_server, small):
    api, _ = kubernetes
    version = small(files={"templates/Dockerfile.template": "FROM scratch\n"})
    assert run(version.name, version.version, **api.environ).returncode == 0
    assert api.created == [expected(version, mlflow_server, "dockerfile")]


def test_a_job_that_runs_is_followed(run, kubernetes, mlflow_server):
    api, version = kubernetes
    name = expected(version, mlflow_server)["metadata"]["name"]
    api.add(name, looks=2)
    done = run(version.name, version.version, **api.environ)
    assert (done.returncode, done.stdout, api.created) == (0, f"{IMAGE}\n", []), done.stderr


def test_a_job_that_has_ended_is_made_again(run, kubernetes, mlflow_server):
    api, version = kubernetes
    body = expected(version, mlflow_server)
    old = api.add(body["metadata"]["name"], ended="Failed", holds=2)
    done = run(version.name, version.version, **api.environ)
    assert done.returncode == 0, done.stderr
    assert api.deleted == [old]
    assert api.created == [body]


def test_somebody_else_s_job_is_followed_where_both_make_one(run, kubernetes, mlflow_server):
    api, version = kubernetes
    api.races = 1
    done = run(version.name, version.version, **api.environ)
    assert (done.returncode, done.stdout, api.created) == (0, f"{IMAGE}\n", []), done.stderr


def test_a_failed_job_ends_with_the_publisher_s_code(run, kubernetes):
    api, version = kubernetes
    api.message = {"state": "failed", "error": "InvalidVersion: No such folder.", "exit_code": 65}
    api.code = 65
    done = run(version.name, version.version, "--result", "r.json", **api.environ)
    assert done.returncode == ExitCode.DATA
    assert "error: No such folder." in done.stderr


def test_an_image_that_cannot_be_pulled_is_told_until_the_time_is_over(run, kubernetes):
    api, version = kubernetes
    api.waiting = {"reason": "ImagePullBackOff", "message": "no such tag"}
    done = run(version.name, version.version, "--timeout", "0.1", **api.environ)
    assert done.returncode == ExitCode.TEMPORARY
    assert "ImagePullBackOff no such tag" in done.stderr
    assert "goes on" in done.stderr


def test_an_account_without_the_right_says_which(run, kubernetes):
    api, version = kubernetes
    api.refuses = "jobs.batch is forbidden: User x cannot get resource"
    done = run(version.name, version.version, "--how", "cluster", **api.environ)
    assert done.returncode == ExitCode.NO_PERMISSION
    assert "jobs.batch is forbidden" in done.stderr


def test_a_certificate_that_is_not_trusted_is_told(run, kubernetes):
    api, version = kubernetes
    done = run(version.name, version.version, "--how", "cluster", **{**api.environ, "KUBE_CA": ""})
    assert done.returncode == ExitCode.CONFIG
    assert "not trusted" in done.stderr


def test_a_pod_s_own_account_is_used(run, kubernetes, tmp_path):
    api, version = kubernetes
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text(f"{api.environ.pop('KUBE_TOKEN')}\n")
    (account / "ca.crt").write_bytes(Path(api.environ.pop("KUBE_CA")).read_bytes())
    (account / "namespace").write_text(Api.namespace)
    host, _, port = api.environ.pop("KUBE_API_URL").partition("://")[2].partition(":")
    api.environ.pop("KUBE_NAMESPACE")
    inside = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port, "KUBE_ACCOUNT_DIR": str(account)}
    done = run(version.name, version.version, **api.environ, **inside)
    assert done.returncode == 0, done.stderr

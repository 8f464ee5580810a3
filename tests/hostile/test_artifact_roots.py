"""Addresses of an author's: the publisher's credentials go to no store that its settings do not name."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import mlflow
import pytest
from mlflow import MlflowClient

from builder.batch.sweep import sweep
from builder.errors import BuilderError, ExitCode, InvalidVersion, ServiceUnavailable
from builder.models import Artifact
from builder.models.catalog import MlflowCatalog
from builder.models.store import ArtifactStore
from builder.settings import CatalogSettings
from scripts.launch import clean_environ
from tests.hostile.attacker import attacker_server
from tests.models.http_answers import Answers, answering_server
from tests.models.models import Shelf, model_folder
from tests.servers.forwarding import forwarding
from tests.waiting import HANG

TOKEN = "mlflow-token-0123456789"
_TRIES = 400


@pytest.fixture
def attacker():
    with attacker_server() as server:
        yield server


@pytest.fixture(autouse=True)
def _environment():
    """A token, and whatever a catalog puts into the environment, for one test alone."""
    before = dict(os.environ)
    # Once more at once, where the server has closed the connection that a request is sent on.
    os.environ.update(MLFLOW_TRACKING_TOKEN=TOKEN, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def model(tmp_path):
    return model_folder(tmp_path / "saved")


def shelf_of(server, monkeypatch, **settings):
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    environ = {"MLFLOW_TRACKING_URI": server.uri, **server.environ, **settings}
    return Shelf(MlflowClient(server.uri), MlflowCatalog.from_settings(CatalogSettings.from_environ(environ)))


@pytest.fixture
def earlier(earlier_mlflow_server, monkeypatch):
    return shelf_of(earlier_mlflow_server, monkeypatch)


@pytest.fixture
def files(mlflow_file_server, monkeypatch):
    return shelf_of(mlflow_file_server, monkeypatch)


def of_source(shelf, source):
    """Register a source; where this release refuses it, return the version that a laxer one would have."""
    try:
        return shelf.version(source)
    except mlflow.MlflowException:
        return shelf.version("s3://bucket/x").model_copy(update={"source": source})


def refused(shelf, version, *, code=ExitCode.NO_PERMISSION):
    """Return the error that the version's artifacts are refused with."""
    with pytest.raises(BuilderError) as raised:
        shelf.catalog.artifacts(version)
    assert raised.value.exit_code == code, raised.value
    return raised.value


# ---- the author's own server


SOURCES = [
    "http://{host}/mlflow-artifacts/artifacts/m",
    "http://{host}/api/2.0/mlflow-artifacts/artifacts/m",
    "HTTP://{host}/api/2.0/mlflow-artifacts/artifacts/m",
    "mlflow-artifacts://{host}/m",
    "MLFLOW-ARTIFACTS://{host}/m",
    "mlflow-artifacts://{tracking}@{host}/m",
    "http://{tracking}@{host}/api/2.0/mlflow-artifacts/artifacts/m",
    "http://{host}/{tracking}/api/2.0/mlflow-artifacts/artifacts/m",
    "http://{host}#@{tracking}/api/2.0/mlflow-artifacts/artifacts/m",
    "http://{host}?@{tracking}/api/2.0/mlflow-artifacts/artifacts/m",
    "http://{host}\\@{tracking}/api/2.0/mlflow-artifacts/artifacts/m",
    "ftp://{host}/m",
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_on_another_server_gets_no_request(earlier, attacker, source):
    tracking = earlier.client.tracking_uri.removeprefix("http://")
    version = of_source(earlier, source.format(host=attacker.host, tracking=tracking))
    error = refused(earlier, version)
    assert attacker.seen == []
    if not {"#", "?", "\\"} & set(source):
        assert attacker.host in error.what
        assert "ALLOWED_ARTIFACT_ROOTS" in str(error)


@pytest.mark.parametrize("location", SOURCES[:6])
def test_an_experiment_on_another_server_gets_no_request(earlier, attacker, location):
    tracking = earlier.client.tracking_uri.removeprefix("http://")
    experiment = earlier.client.create_experiment(
        f"experiment of {attacker.host}", artifact_location=location.format(host=attacker.host, tracking=tracking)
    )
    run = earlier.client.create_run(experiment).info.run_id
    versions = [earlier.version(f"runs:/{run}/m", run_id=run)]
    if not version_2(earlier):
        logged = earlier.client.create_logged_model(experiment, name="m", source_run_id=run)
        earlier.client.log_outputs(run, [mlflow.entities.LoggedModelOutput(model_id=logged.model_id, step=0)])
        own = earlier.client.create_run(earlier.experiment()).info.run_id
        versions.append(earlier.version(f"models:/{logged.model_id}", model_id=logged.model_id, run_id=own))
    for version in versions:
        assert attacker.host in refused(earlier, version).what
    assert attacker.seen == []


def version_2(shelf):
    try:
        shelf.client.search_logged_models(["0"])
    except mlflow.MlflowException:
        return True
    return False


def test_a_copy_whose_first_version_is_deleted_gets_no_request(earlier, attacker):
    first = earlier.version(f"mlflow-artifacts://{attacker.host}/m")
    copy = earlier.client.copy_model_version(f"models:/{first.name}/1", f"{first.name}-kept")
    refused(earlier, earlier.catalog.find(copy.name, "1"))
    earlier.client.delete_registered_model(first.name)
    refused(earlier, earlier.catalog.find(copy.name, "1"))
    assert attacker.seen == []


def test_register_sends_nothing_to_an_experiments_own_server(earlier, attacker, model):
    from builder.models.register import register

    name = f"shared by {attacker.host}"
    earlier.client.create_experiment(name, artifact_location=f"mlflow-artifacts://{attacker.host}/m")
    with pytest.raises(BuilderError, match="ALLOWED_ARTIFACT_ROOTS"):
        register(earlier.catalog, model, name="mine", experiment=name)
    assert attacker.seen == []


@pytest.mark.parametrize("source", ["runs:/{run}/m", "Runs:/{run}/m", "RUNS:/{run}", "models://x/{name}/1"])
def test_what_mlflow_would_look_up_itself_is_looked_up_by_us(earlier, attacker, source):
    experiment = earlier.client.create_experiment(
        f"looked up {attacker.host}", artifact_location=f"mlflow-artifacts://{attacker.host}/m"
    )
    run = earlier.client.create_run(experiment).info.run_id
    name = earlier.version(f"mlflow-artifacts://{attacker.host}/m").name
    try:
        version = earlier.version(source.format(run=run, name=name))
    except mlflow.MlflowException as error:
        pytest.skip(f"this release refuses it: {error}")
    with pytest.raises(BuilderError):
        earlier.catalog.artifacts(version)
    assert attacker.seen == []


def test_fetch_says_so_and_records_it(earlier_mlflow_server, attacker, registry, tmp_path):
    client = MlflowClient(earlier_mlflow_server.uri)
    name = f"attacks-{attacker.host.replace(':', '-')}"
    client.create_registered_model(name)
    client.create_model_version(
        name, f"http://{attacker.host}/mlflow-artifacts/artifacts/m", tags={"EXTERNAL_TARGET_PLTR_FOUNDRY": "true"}
    )
    environ = {
        "MLFLOW_TRACKING_URI": earlier_mlflow_server.uri,
        "MLFLOW_TRACKING_TOKEN": TOKEN,
        "REGISTRY_URL": f"{registry.host}/{name}",
        "MODEL_NAME": name,
        "MODEL_VERSION": "1",
        "BUILDER_WORKSPACE": str(tmp_path / "workspace"),
        "LOG_FORMAT": "json",
    }
    fetch = subprocess.run(
        [sys.executable, "-m", "builder", "fetch"],
        env=clean_environ(**environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert fetch.returncode == ExitCode.NO_PERMISSION, fetch.stderr
    tags = client.get_model_version(name, "1").tags
    assert tags["publish.pltr_foundry.state"] == "failed"
    assert tags["publish.pltr_foundry.attempts"] == "1"
    for said in (fetch.stderr, tags["publish.pltr_foundry.error"]):
        assert attacker.host in said
        assert "ALLOWED_ARTIFACT_ROOTS" in said
        assert TOKEN not in said
    assert attacker.seen == []


# ---- our own server, asked for other things than artifacts


@pytest.mark.parametrize(
    "path",
    [
        "/api/2.0/mlflow/experiments/get?experiment_id=0",
        "/api/2.0/mlflow/experiments",
        "/mlflow-artifacts/artifacts",
        "/api/2.0/mlflow-artifacts/artifacts",
        "/api/2.0/mlflow-artifacts/artifacts/",
        "/api/2.0/mlflow-artifacts/artifacts/%2e%2e/%2e%2e/mlflow/x",
        "/api/2.0/mlflow-artifacts/artifacts/a%2f..%2f..",
        "/api/2.0/mlflow-artifacts/artifacts?x=/mlflow-artifacts/artifacts/m",
        "//api/2.0/mlflow-artifacts/artifacts/m",
        "/api/2.0/mlflow-artifacts//artifacts/m",
        "/health",
    ],
)
def test_the_tracking_server_is_asked_for_artifacts_alone(path):
    with answering_server(asked := Answers()) as uri:
        with pytest.raises(BuilderError) as raised:
            ArtifactStore(uri)._list(f"{uri}{path}", "")
        assert raised.value.exit_code == ExitCode.NO_PERMISSION
    assert asked.paths == []


def test_a_files_name_is_no_part_of_the_address(tmp_path):
    with answering_server(asked := Answers(body=b"1234")) as uri:
        artifact = Artifact(path="a", size=4, root="mlflow-artifacts:/1/m", remote="%2e%2e/%2e%2e/api?a=b#c")
        ArtifactStore(uri).download(artifact, tmp_path / "a")
    assert asked.paths[-1] == "/api/2.0/mlflow-artifacts/artifacts/1/m/%252e%252e/%252e%252e/api%3Fa%3Db%23c"


@pytest.mark.parametrize("model_id", ["../../x", "m-1?x", "m-1#", "m-1/../y", "%2e%2e"])
def test_a_models_id_is_no_part_of_an_address(earlier, model_id):
    version = earlier.in_run((Path(__file__).parent, "mymodel"))
    odd = version.model_copy(update={"model_id": model_id})
    assert "not an id" in refused(earlier, odd, code=ExitCode.DATA).what


# ---- an object store


@pytest.fixture
def asked_s3(mlflow_s3_server):
    """The object store, with another team's bucket; seen through a proxy that counts."""
    endpoint = mlflow_s3_server.environ["MLFLOW_S3_ENDPOINT_URL"]
    client = boto3.client("s3", endpoint_url=endpoint, **credentials(mlflow_s3_server))
    for bucket in ("other-teams-bucket", "mlflow-private"):
        client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key="private/MLmodel", Body=b"secret")
    client.put_object(Bucket="mlflow", Key="artifacts-private/m/MLmodel", Body=b"secret")
    client.close()
    with forwarding(endpoint.removeprefix("http://")) as proxy:
        yield proxy


def credentials(server):
    return {
        "region_name": server.environ["AWS_DEFAULT_REGION"],
        "aws_access_key_id": server.environ["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": server.environ["AWS_SECRET_ACCESS_KEY"],
    }


@pytest.fixture
def s3_shelf(mlflow_s3_server, asked_s3, monkeypatch):
    def make(**settings):
        shelf = shelf_of(mlflow_s3_server, monkeypatch, **settings)
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{asked_s3.host}")
        return shelf

    return make


@pytest.mark.parametrize(
    "source",
    [
        "s3://other-teams-bucket/private",
        "S3://other-teams-bucket/private",
        "s3://mlflow-private/private",
        "s3://mlflow/artifacts-private/m",
        "s3://mlflow/artifacts",
        "s3://mlflow",
        "s3://mlflow/artifacts?endpoint=http://127.0.0.2",
        "s3://mlflow/artifacts/0;x",
        "s3://user:word@mlflow/artifacts/0/m",
    ],
)
def test_the_publishers_bucket_credential_reads_the_servers_own_root_alone(s3_shelf, asked_s3, source):
    shelf = s3_shelf()
    refused(shelf, of_source(shelf, source))
    assert asked_s3.seen == []


def test_a_run_in_another_teams_bucket_is_refused_until_it_is_named(s3_shelf, asked_s3, model):
    shelf = s3_shelf()
    name = f"elsewhere-{asked_s3.host}"
    experiment = shelf.client.create_experiment(name, artifact_location="s3://other-teams-bucket/ours")
    run = shelf.run((model, "mymodel"), experiment=experiment)
    version = shelf.version(f"runs:/{run}/mymodel", run_id=run)
    asked_s3.seen.clear()
    assert "'s3://other-teams-bucket/ours/" in refused(shelf, version).what
    assert asked_s3.seen == []
    named = s3_shelf(ALLOWED_ARTIFACT_ROOTS="s3://mlflow/artifacts, s3://other-teams-bucket/ours/")
    assert {artifact.path for artifact in named.catalog.artifacts(version)} > {"mymodel/MLmodel"}
    other = s3_shelf(ALLOWED_ARTIFACT_ROOTS="s3://mlflow/artifacts, s3://other-teams-bucket/our")
    assert "s3://other-teams-bucket/our)" in refused(other, version).what.replace("'", "")


def test_the_default_experiment_stays_where_the_server_put_it(s3_shelf, model):
    shelf = s3_shelf()
    version = shelf.in_run((model, "mymodel"))
    shelf.client.rename_experiment("0", "was the default")
    shelf.client.delete_experiment("0")
    fake = shelf.client.create_experiment("Default", artifact_location="s3://other-teams-bucket/0")
    try:
        assert shelf.client.get_experiment("0").artifact_location == "s3://mlflow/artifacts/0"
        fresh = s3_shelf()
        assert fresh.catalog.artifacts(version)
        refused(fresh, fresh.version("s3://other-teams-bucket/private"))
    finally:
        shelf.client.rename_experiment(fake, "no default")
        shelf.client.restore_experiment("0")
        shelf.client.rename_experiment("0", "Default")


def test_mlflow_that_is_away_refuses_nobody():
    with answering_server(Answers(status=503)) as uri, pytest.raises(ServiceUnavailable):
        MlflowCatalog(uri).store.folder("s3://bucket/x")


# ---- kinds of stores


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("azureml://locations/x/workspaces/y/models/m", ExitCode.CONFIG, "azureml-mlflow"),
        ("oss://bucket/m", ExitCode.CONFIG, "aliyunstoreplugin"),
        ("dbfs:/databricks/mlflow/1/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("dbfs://profile@databricks/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("gs://bucket/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("abfss://x@attackeraccount.dfs.core.windows.net/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("wasbs://x@attackeraccount.blob.core.windows.net/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("r2://bucket@127.0.0.2/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("b2://bucket@127.0.0.2/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("hdfs://127.0.0.2:8020/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("viewfs://127.0.0.2/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("sftp://user:pass@127.0.0.2/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("nobodys://x/m", ExitCode.NO_PERMISSION, "ALLOWED_ARTIFACT_ROOTS"),
        ("/home/me/mlruns/1/2/artifacts/m", ExitCode.DATA, "on the machine that logged"),
        ("file:///home/me/mlruns/1/2/artifacts/m", ExitCode.DATA, "on the machine that logged"),
        ("file:///C:/Users/me/mlruns/1/m", ExitCode.DATA, "on the machine that logged"),
        ("C:\\Users\\me\\mlruns\\1\\m", ExitCode.DATA, "on the machine that logged"),
        ("\\\\share\\mlruns\\1\\m", ExitCode.DATA, "on the machine that logged"),
    ],
)
def test_a_store_that_is_not_the_servers(mlflow_server, monkeypatch, source, code, said):
    shelf = shelf_of(mlflow_server, monkeypatch)
    assert said in str(refused(shelf, of_source(shelf, source), code=code))


def test_a_sweep_gives_up_on_an_address_that_is_refused(mlflow_server, registry, monkeypatch, small, small_settings):
    refused_version = small()
    refused_version.client.delete_model_version(refused_version.name, refused_version.version)
    refused_version.client.create_model_version(
        refused_version.name,
        "s3://other-teams-bucket/m",
        tags={"EXTERNAL_TARGET_PLTR_FOUNDRY": "true", "ROOTS": "true"},
    )
    settings = small_settings(refused_version, TARGET_TAG="ROOTS", SWEEP_ATTEMPTS="2")
    states = [[swept.state for swept in sweep(settings)] for _ in range(3)]
    assert states == [["failed"], ["failed"], ["waiting"]]


# ---- folders on this machine


def folder_of(shelf, version):
    return Path(shelf.client.get_run(version.run_id).info.artifact_uri.removeprefix("file://"))


def test_a_link_swapped_for_a_file_never_gives_what_it_leads_to(files, model, tmp_path):
    """The author's process puts a link and a file in each other's place while the publisher reads."""
    secret = tmp_path / "secret"
    secret.write_text("numpx\n")  # as long as the file that was listed
    version = files.in_run((model, "mymodel"))
    target = folder_of(files, version) / "mymodel" / "requirements.txt"
    link, plain = tmp_path / "link", tmp_path / "plain"
    done = threading.Event()

    def swap():
        for turn in itertools.count():
            if done.is_set():
                return
            if turn % 2:
                link.symlink_to(secret)
                link.replace(target)
            else:
                plain.write_text("numpy\n")
                plain.replace(target)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        outcomes = attempts(files, version, tmp_path, {"numpy\n", "refused"})
    finally:
        done.set()
        swapper.join()
    assert "numpx\n" not in outcomes
    assert outcomes == {"numpy\n", "refused"}


def test_a_folder_swapped_for_a_link_never_gives_what_it_leads_to(files, model, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    (private / "requirements.txt").write_text("numpx\n")
    version = files.in_run((model, "mymodel"))
    target = folder_of(files, version) / "mymodel"
    aside = tmp_path / "aside"
    done = threading.Event()

    def swap():
        while not done.is_set():
            target.rename(aside)
            target.symlink_to(private)
            target.unlink()
            aside.rename(target)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        outcomes = attempts(files, version, tmp_path, {"refused"})
    finally:
        done.set()
        swapper.join()
    assert "numpx\n" not in outcomes
    assert "refused" in outcomes


def attempts(shelf, version, folder, wanted):
    """Return what many attempts gave; the two threads may take turns for a while, so that all end alike."""
    outcomes, deadline = set(), time.monotonic() + HANG
    for number in itertools.count():
        if number >= _TRIES and (wanted <= outcomes or time.monotonic() > deadline):
            return outcomes
        outcomes |= attempt(shelf, version, folder / str(number))
    raise AssertionError


def attempt(shelf, version, destination):
    try:
        for artifact in shelf.catalog.artifacts(version):
            if artifact.path == "mymodel/requirements.txt":
                shelf.catalog.download(artifact, destination)
                return {destination.read_text()}
    except InvalidVersion:
        return {"refused"}
    return set()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_neither_read_nor_waited_for(files, model, tmp_path, monkeypatch, kind):
    version = files.in_run((model, "mymodel"))
    artifact = next(a for a in files.catalog.artifacts(version) if a.path == "mymodel/requirements.txt")
    path = folder_of(files, version) / "mymodel" / "requirements.txt"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "pipe":
            os.mkfifo(path)
        else:
            # The address of a socket is shorter than the paths of tests can be.
            monkeypatch.chdir(path.parent)
            listener.bind(path.name)
        with pytest.raises(InvalidVersion, match="neither a file nor a folder"):
            files.catalog.artifacts(version)
        with pytest.raises(InvalidVersion):
            files.catalog.download(artifact, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_file_that_grows_is_not_copied_without_end(files, model, tmp_path):
    version = files.in_run((model, "mymodel"))
    artifact = next(a for a in files.catalog.artifacts(version) if a.path == "mymodel/requirements.txt")
    path = folder_of(files, version) / "mymodel" / "requirements.txt"
    os.truncate(path, 1 << 40)
    with pytest.raises(ServiceUnavailable, match="with 7 bytes instead of 6"):
        files.catalog.download(artifact, tmp_path / "file")


@pytest.mark.parametrize(
    "source", ["/etc", "file:///etc", "{folder}/../../../../etc", "file://{folder}/%2e%2e/x", "{store}"]
)
def test_a_folder_outside_the_servers_own_is_refused(files, model, source):
    version = files.in_run((model, "mymodel"))
    folder = folder_of(files, version)
    elsewhere = version.model_copy(
        update={"source": source.format(folder=folder, store=folder.parents[3] / "store"), "run_id": ""}
    )
    refused(files, elsewhere)


def test_a_link_within_the_store_that_leads_out_of_it_is_no_root(files, model):
    version = files.in_run((model, "mymodel"))
    out = folder_of(files, version) / "out"
    out.symlink_to("/etc")
    error = refused(files, version.model_copy(update={"source": str(out), "run_id": ""}), code=ExitCode.DATA)
    assert "links are not followed" in str(error)


@pytest.mark.filterwarnings("ignore")  # MLflow warns of its own stores
@pytest.mark.parametrize("scheme", ["file:{folder}/mlruns", "sqlite:///{folder}/mlflow.db"])
def test_a_laptop_needs_no_setting(tmp_path, model, monkeypatch, scheme):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    uri = scheme.format(folder=tmp_path)
    shelf = Shelf(MlflowClient(uri), MlflowCatalog(uri))
    version = shelf.in_run((model, "mymodel"))
    assert {artifact.path for artifact in shelf.catalog.artifacts(version)} > {"mymodel/MLmodel"}
    refused(shelf, version.model_copy(update={"source": "/etc"}))


def test_a_folder_that_only_the_logging_machine_has_is_said(files, model, tmp_path):
    version = files.in_run((model, "mymodel"))
    folder = folder_of(files, version)
    folder.rename(tmp_path / "gone")
    assert "on the machine that logged" in str(refused(files, version, code=ExitCode.DATA))


# ---- the list itself


@pytest.mark.parametrize(
    ("tracking", "uri", "read"),
    [
        ("https://h", "mlflow-artifacts:/1/m", "mlflow-artifacts:/1/m"),
        ("https://h", "mlflow-artifacts://h/1/m", "mlflow-artifacts:/1/m"),
        ("https://h", "mlflow-artifacts://H:443/1/m/", "mlflow-artifacts:/1/m"),
        ("https://h", "mlflow-artifacts://h:80/1/m", None),
        ("https://h", "mlflow-artifacts://h./1/m", None),
        ("https://h", "mlflow-artifacts://h@attacker/1/m", None),
        ("https://h", "mlflow-artifacts://attacker@h/1/m", None),
        ("https://h", "mlflow-artifacts:/", None),
        ("https://h", "mlflow-artifacts://h", None),
        ("https://h", "mlflow-artifacts:/api/2.0/mlflow-artifacts/artifacts", None),
        ("https://h", "https://h/api/2.0/mlflow-artifacts/artifacts/1/m", "mlflow-artifacts:/1/m"),
        ("https://h", "https://h:443/api/2.0/mlflow-artifacts/artifacts/1/m", "mlflow-artifacts:/1/m"),
        ("https://h", "http://h/api/2.0/mlflow-artifacts/artifacts/1/m", None),
        ("https://h", "http://h:443/api/2.0/mlflow-artifacts/artifacts/1/m", None),
        ("https://h:5000", "https://h/api/2.0/mlflow-artifacts/artifacts/1/m", None),
        ("https://h/mlflow/", "https://h/mlflow/api/2.0/mlflow-artifacts/artifacts/1/m", "mlflow-artifacts:/1/m"),
        ("https://h/mlflow", "https://h/api/2.0/mlflow-artifacts/artifacts/1/m", None),
        ("https://h/mlflow", "mlflow-artifacts:/1/m", "mlflow-artifacts:/1/m"),
        ("https://u:p@h", "mlflow-artifacts://h/1/m", "mlflow-artifacts:/1/m"),
        ("https://[::1]:5", "mlflow-artifacts://[::1]:5/1", "mlflow-artifacts:/1"),
        ("https://h", "mlflow-artifacts:/1/../2", None),
        ("https://h", "mlflow-artifacts:/1//2", None),
        ("https://h", "mlflow-artifacts:/1/%2e%2e/2", None),
        ("https://h", "mlflow-artifacts:/1/m\t", None),
        ("https://h", "mlflow-artifacts://h\t/1/m", None),
        ("https://h", "ht\ntps://attacker/api/2.0/mlflow-artifacts/artifacts/m", None),
        ("https://h", "https://h:99999/api/2.0/mlflow-artifacts/artifacts/m", None),
        ("https://h", "https://h:x/api/2.0/mlflow-artifacts/artifacts/m", None),
        ("https://h", "https://[/api/2.0/mlflow-artifacts/artifacts/m", None),
        ("https://h", "mlflow-artifacts:/1/naïve name", "mlflow-artifacts:/1/naïve name"),
        ("sqlite:///x.db", "mlflow-artifacts:/1/m", None),
        ("sqlite:///x.db", "https://h/api/2.0/mlflow-artifacts/artifacts/m", None),
        ("databricks", "mlflow-artifacts:/1/m", None),
    ],
)
def test_what_is_handed_on_at_which_origin(tracking, uri, read):
    store = ArtifactStore(tracking)
    if read is None:
        with pytest.raises(BuilderError) as raised:
            store.folder(uri)
        assert raised.value.exit_code == ExitCode.NO_PERMISSION
    else:
        assert store.folder(uri).uri == read
        assert store.folder(read).uri == read


def test_the_registrys_own_server_hands_artifacts_on_too():
    environ = {"MLFLOW_TRACKING_URI": "https://h", "MLFLOW_REGISTRY_URI": "https://r:8443/x/"}
    store = MlflowCatalog.from_settings(CatalogSettings.from_environ(environ)).store
    address = "https://r:8443/x/api/2.0/mlflow-artifacts/artifacts/1/m"
    assert store.folder(address).uri == address


@pytest.mark.parametrize("text", ["s3://a/../b", "s3://", "/", "s3://a/%2e", "relative/..", "http://[/x", "C:\\x"])
def test_a_setting_that_is_no_list_of_folders(text):
    environ = {"MLFLOW_TRACKING_URI": "https://h", "ALLOWED_ARTIFACT_ROOTS": f"s3://good/x,{text}"}
    with pytest.raises(BuilderError, match="ALLOWED_ARTIFACT_ROOTS") as raised:
        CatalogSettings.from_environ(environ)
    assert raised.value.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize(
    "location",
    ["s3://bucket", "s3://bucket/1", "/0", "mlflow-artifacts://127.0.0.2/0", "s3://a/../0", "", "runs:/x/0", "/etc/0?"],
)
def test_an_answer_that_tells_no_root(location):
    said = {"experiment": {"experiment_id": "0", "name": "Default", "artifact_location": location}}
    with answering_server(Answers(body=json.dumps(said).encode())) as uri:
        for root in ("s3://bucket/m", "s3://a/m", "/etc/x", "mlflow-artifacts://127.0.0.2/m"):
            with pytest.raises(BuilderError):
                MlflowCatalog(uri).store.folder(root)

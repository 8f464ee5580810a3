"""`DEST/<model>/v<N>`: whole or not at all, and only what is new or changed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from builder.batch.download import download, download_all
from builder.errors import InvalidVersion, ServiceUnavailable, VersionNotFound
from builder.models.catalog import MlflowCatalog
from builder.settings import CatalogSettings
from tests.models.models import Shelf, model_folder

SEED_DOCKERFILE = """FROM python:3.11-slim
ENV PATH=$PATH:/home/app/.local/bin
COPY $model_download_folder/$model_folder /app/$model_folder
COPY ${model_download_folder}/${model_client_folder} /app
ENTRYPOINT ["python", "/app/$entry_point"]
"""


@pytest.fixture
def shelf(mlflow_server):
    return Shelf(MlflowClient(mlflow_server.uri), MlflowCatalog(mlflow_server.uri))


@pytest.fixture
def model(tmp_path):
    return model_folder(tmp_path / "saved")


def nothing(version, folder):
    return {}


def run(shelf, destination, versions, render=nothing):
    return {
        (result.version.name, result.version.version): result
        for result in download(shelf.catalog, destination, versions, render=render)
    }


def states(results):
    return [result.state for result in results.values()]


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_new_or_changed_is_downloaded(shelf, model, tmp_path, monkeypatch):
    one, two = (shelf.in_run((model, "mymodel"), name="sparing") for _ in range(2))
    asked = []
    real = shelf.catalog.download
    monkeypatch.setattr(shelf.catalog, "download", lambda *a: (asked.append(a), real(*a))[1])
    destination = tmp_path / "deep" / "destination"

    assert states(run(shelf, destination, [one])) == ["new"]
    assert sorted(path.name for path in (destination / "sparing").iterdir()) == [".v1.json", "v1"]
    assert tree(destination / "sparing" / "v1") == {f"mymodel/{path}": text for path, text in tree(model).items()}
    assert len(asked) == 5

    assert states(run(shelf, destination, [one, two])) == ["unchanged", "new"]
    assert len(asked) == 10

    # Artifacts of a run can change after a version was registered, and so can its tags.
    (model / "requirements.txt").write_text("numpy\nscipy\n")
    shelf.client.log_artifact(one.run_id, str(model / "requirements.txt"), "mymodel")
    shelf.catalog.set_tags(two, {"MODEL_CLIENT_FOLDER": "elsewhere"})
    two = shelf.catalog.find(two.name, two.version)
    assert states(run(shelf, destination, [one, two])) == ["changed", "changed"]
    assert (destination / "sparing/v1/mymodel/requirements.txt").read_text() == "numpy\nscipy\n"

    # What publishing writes is no change.
    shelf.catalog.set_tags(two, {"publish.pltr_foundry.state": "published"})
    assert states(run(shelf, destination, [shelf.catalog.find(two.name, two.version)])) == ["unchanged"]

    shutil.rmtree(destination / "sparing" / "v2")
    assert states(run(shelf, destination, [one, two])) == ["unchanged", "new"]


@pytest.mark.parametrize("note", ["", "[]", "{", '{"made_from": 3}', "{}"])
def test_a_note_that_cannot_be_read_means_once_more(shelf, model, tmp_path, note):
    version = shelf.in_run((model, "mymodel"), name="noted")
    run(shelf, tmp_path, [version])
    (tmp_path / "noted" / f".v{version.version}.json").write_text(note)
    assert states(run(shelf, tmp_path, [version])) == ["changed"]


def test_one_bad_version_stops_nobody_and_leaves_nothing(shelf, model, tmp_path):
    good = [shelf.in_run((model, "mymodel"), name=name) for name in ("a good one", "z good one")]
    empty = shelf.version("s3://bucket/x", name="an empty one", run_id=shelf.run())
    deleted = shelf.in_run((model, "mymodel"), name="a deleted one")
    unrendered = shelf.in_run((model, "mymodel"), name="unrendered")
    tagged_badly = shelf.in_run((model, "mymodel"), name="tagged badly", tags={"MODEL_FOLDER": "../x"})
    shelf.client.delete_registered_model(deleted.name)

    def render(version, folder):
        if version.name == "unrendered":
            message = "no such name"
            raise InvalidVersion(message)
        if version.name == "a deleted one":
            message = "deleted"
            raise VersionNotFound(message)
        return {}

    results = run(shelf, tmp_path, [good[0], empty, deleted, unrendered, tagged_badly, good[1]], render)
    assert states(results) == ["new", "failed", "gone", "failed", "failed", "new"]
    assert [result.exit_code for result in results.values()][:3] == [0, results["an empty one", "1"].exit_code, 0]
    assert results["unrendered", "1"].exit_code == 65
    whole = [path for path in tmp_path.glob("*/*") if path.parent.name != "saved"]
    assert {path.parent.name.partition("--")[0] for path in whole} == {"a-good-one", "z-good-one"}


def test_a_folder_that_was_there_outlives_a_failure(shelf, model, tmp_path):
    version = shelf.in_run((model, "mymodel"), name="kept")
    run(shelf, tmp_path, [version])
    before = tree(tmp_path / "kept" / "v1")
    shelf.catalog.set_tags(version, {"MODEL_CLIENT_FOLDER": "changed"})

    def away(*_):
        message = "away"
        raise ServiceUnavailable(message)

    changed = shelf.catalog.find("kept", "1")
    assert states(run(shelf, tmp_path, [changed], render=away)) == ["failed"]
    assert tree(tmp_path / "kept" / "v1") == before
    assert states(run(shelf, tmp_path, [changed])) == ["changed"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [".v1.json", "v1"]


@pytest.mark.parametrize("name", ["../../escaped", "..", "with blank", "$(touch x)", "wheel-layers", "Ünï"])
def test_a_name_never_leaves_the_destination(shelf, model, tmp_path, name):
    # MLflow takes no slash in a name; another registry may.
    version = shelf.in_run((model, "mymodel")).model_copy(update={"name": name})
    destination = tmp_path / "destination"
    (result,) = download(shelf.catalog, destination, [version], render=nothing)
    assert result.state == "new"
    assert result.folder.resolve().parent.parent == destination.resolve()


def test_a_rendered_file_takes_the_place_of_an_artifact_but_not_of_a_folder(shelf, model, tmp_path):
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "Dockerfile").write_text("FROM logged\n")
    rendered = {"Dockerfile": b"FROM rendered\n", "create_docker_image.sh": b"#!/bin/sh\n"}
    version = shelf.in_run((model, "mymodel"), (tmp_path / "top", ""), name="rendered")
    (result,) = download(shelf.catalog, tmp_path / "d", [version], render=lambda *_: rendered)
    assert (result.folder / "Dockerfile").read_bytes() == b"FROM rendered\n"
    assert (result.folder / "create_docker_image.sh").stat().st_mode & 0o777 == 0o755
    (tmp_path / "top" / "x").mkdir()
    (tmp_path / "top" / "x" / "f").write_text("x")
    version = shelf.in_run((model, "mymodel"), (tmp_path / "top" / "x", "Dockerfile"), name="in the way")
    (result,) = download(shelf.catalog, tmp_path / "d", [version], render=lambda *_: rendered)
    assert isinstance(result.error, InvalidVersion)


# ---- with settings, and the project's own rendering


@pytest.fixture
def seed_version(shelf, model, tmp_path):
    """A version in the usual layout, on a shelf of its own tag, and one without templates."""
    for folder, name, text in (
        ("client", "app.py", "print('hello')\n"),
        ("templates", "Dockerfile.template", SEED_DOCKERFILE),
        ("templates", "create_docker_image.sh.template", "#!/bin/sh\necho $model_name:v$model_version\n"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    tags = {"MODEL_FOLDER": "mymodel", "MODEL_ENTRY_POINT": "app.py", "DOWNLOAD_ME": "True"}
    folders = [(model, "mymodel"), (tmp_path / "client", "client"), (tmp_path / "templates", "templates")]
    name = f"seed_model_{tmp_path.name}"
    shelf.in_run(folders[0], name=name, tags={"DOWNLOAD_ME": "true"})
    return shelf.in_run(*folders, tags=tags, name=name)


def settings(shelf, **values):
    environ = {
        "MLFLOW_TRACKING_URI": shelf.client.tracking_uri,
        "TARGET_TAG": "DOWNLOAD_ME",
    }
    return CatalogSettings.from_environ({**environ, **values})


def test_tagged_versions_come_with_what_their_templates_make(shelf, seed_version, tmp_path):
    plain, rendered = list(download_all(settings(shelf), tmp_path / "out", name=seed_version.name))
    assert (plain.state, rendered.state) == ("new", "new")
    # Without a template the built-in ones are what the image would be made by.
    assert "FROM docker.io/library/python:3.11-slim" in (plain.folder / "Dockerfile").read_text()
    script = (plain.folder / "create_docker_image.sh").read_text()
    assert f"{plain.folder.parent.name}:v1" in script or plain.folder.parent.name in script
    assert (plain.folder / "create_docker_image.sh").stat().st_mode & 0o777 == 0o755
    assert (rendered.folder / "Dockerfile").read_text() == (
        "FROM python:3.11-slim\n"
        "ENV PATH=$PATH:/home/app/.local/bin\n"
        "COPY ./mymodel /app/mymodel\n"
        "COPY ./client /app\n"
        'ENTRYPOINT ["python", "/app/app.py"]\n'
    )
    said = subprocess.run([rendered.folder / "create_docker_image.sh"], capture_output=True, text=True, check=True)
    assert said.stdout == f"{rendered.folder.parent.name}:v2\n"
    again = download_all(settings(shelf), tmp_path / "out", name=seed_version.name)
    assert [result.state for result in again] == ["unchanged", "unchanged"]


@pytest.mark.parametrize(
    ("name", "size"), [("mymodel/data/weights.bin", None), ("mymodel/MLmodel", 3), ("Dockerfile", None)]
)
def test_a_file_that_is_missing_or_cut_off_is_noticed(shelf, model, tmp_path, name, size):
    version = shelf.in_run((model, "mymodel"))
    (first,) = download_all(settings(shelf), tmp_path / "out", name=version.name, version="1")
    before = tree(first.folder)
    if size is None:
        (first.folder / name).unlink()
    else:
        (first.folder / name).write_bytes(before[name][:size])
    (again,) = download_all(settings(shelf), tmp_path / "out", name=version.name, version="1")
    assert again.state == "changed"
    assert tree(again.folder) == before
    (last,) = download_all(settings(shelf), tmp_path / "out", name=version.name, version="1")
    assert last.state == "unchanged"


def test_what_no_dockerfile_can_be_made_for_is_downloaded_all_the_same(shelf, model, tmp_path, capfd):
    (model / "requirements.txt").unlink()
    version = shelf.in_run((model, "mymodel"))
    (result,) = download_all(settings(shelf), tmp_path / "out", name=version.name, version="1")
    assert result.state == "new"
    assert "mymodel/MLmodel" in tree(result.folder)
    assert not (result.folder / "Dockerfile").exists()
    (again,) = download_all(settings(shelf), tmp_path / "out", name=version.name, version="1")
    assert again.state == "unchanged"


def test_the_author_s_own_dockerfile_is_left_as_it_is(shelf, model, tmp_path):
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "Dockerfile").write_text("FROM logged\n")
    version = shelf.in_run((model, "mymodel"), (tmp_path / "top", ""))
    (result,) = download_all(settings(shelf), tmp_path / "out", name=version.name, version="1")
    assert (result.folder / "Dockerfile").read_text() == "FROM logged\n"
    assert (result.folder / "create_docker_image.sh").exists()


def test_folders_of_deleted_versions_are_told_and_stay(shelf, model, tmp_path, caplog):
    tag = {f"KEEP_{tmp_path.name}": "true"}
    name = f"deleted later {tmp_path.name}"
    stays, goes, untagged = (shelf.in_run((model, "mymodel"), name=name, tags=tag) for _ in range(3))
    asked = settings(shelf, TARGET_TAG=next(iter(tag)))
    assert len(list(download_all(asked, tmp_path / "out"))) == 3
    shelf.client.delete_model_version(name, goes.version)
    shelf.client.delete_model_version_tag(name, untagged.version, next(iter(tag)))
    results = {result.version.version: result for result in download_all(asked, tmp_path / "out")}
    assert {number: result.state for number, result in results.items()} == {
        stays.version: "unchanged",
        goes.version: "gone",
    }
    gone = results[goes.version]
    assert gone.folder.is_dir()
    assert gone.version.name == name
    assert gone.exit_code == 0
    assert str(gone.folder) in caplog.text
    # What another model's download is about is nobody's business.
    other = shelf.in_run((model, "mymodel"), tags=tag)
    assert [result.state for result in download_all(asked, tmp_path / "out", name=other.name)] == ["new"]


def test_one_version_need_not_carry_the_tag(shelf, model, tmp_path):
    version = shelf.in_run((model, "mymodel"))
    found = download_all(settings(shelf), tmp_path / "out", name=version.name, version="1")
    assert [result.state for result in found] == ["new"]
    with pytest.raises(VersionNotFound):
        download_all(settings(shelf), tmp_path / "out", name=version.name, version="2")


def test_every_tagged_version_of_every_model(shelf, model, tmp_path):
    versions = [shelf.in_run((model, "mymodel"), tags={"ALL_OF_THEM": "true"}) for _ in range(2)]
    shelf.in_run((model, "mymodel"), tags={"ALL_OF_THEM": "false"})
    results = list(download_all(settings(shelf, TARGET_TAG="ALL_OF_THEM"), tmp_path / "out"))
    assert [result.version.name for result in results] == sorted(version.name for version in versions)
    assert all(json.loads(Path(r.folder.parent, ".v1.json").read_text())["made_from"] for r in results)

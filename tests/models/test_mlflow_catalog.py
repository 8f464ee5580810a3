"""Versions as MLflow keeps them: found, listed, read and tagged on real servers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import mlflow
import pytest
from mlflow.utils.file_utils import local_file_uri_to_path

from builder.errors import InvalidVersion, VersionNotFound
from builder.models import Inputs
from builder.models.catalog import MlflowCatalog
from builder.models.context import find_model_folder
from tests.models.models import TARGET, model_folder


def content(catalog, version, folder):
    """Download a version's files; return the hash of each by its path."""
    found = {}
    for number, artifact in enumerate(catalog.artifacts(version)):
        path = folder / str(number)
        catalog.download(artifact, path)
        assert artifact.size == path.stat().st_size
        found[artifact.path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def expected(model, client_programs):
    folders = {"mymodel": model, "client": client_programs}
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_files_come_out_however_a_model_was_registered(any_shelf, model, client_programs, tmp_path):
    shelf = any_shelf
    programs = (client_programs, "client")
    run = shelf.run(programs)
    logged = shelf.logged_model(model, "mymodel", run)
    only_model = shelf.version(f"models:/{logged}", model_id=logged)
    in_run = shelf.in_run((model, "mymodel"), programs)
    versions = {
        "runs, MLflow 3": shelf.version(f"runs:/{run}/mymodel", run_id=run),
        "models": shelf.version(f"models:/{logged}", model_id=logged, run_id=run),
        "models without a run id": only_model,
        "another name, a folder by tag": shelf.version(
            f"models:/{(other := shelf.logged_model(model, 'sk', shelf.run(programs)))}",
            model_id=other,
            tags={"MODEL_FOLDER": "mymodel"},
        ),
        "files of a run": in_run,
        "runs, MLflow 2": shelf.version(f"runs:/{in_run.run_id}/mymodel", run_id=in_run.run_id),
        "a copy": shelf.catalog.find(
            shelf.client.copy_model_version(f"models:/{only_model.name}/1", f"{only_model.name}-copy").name, "1"
        ),
    }
    for how, version in versions.items():
        folder = tmp_path / how
        folder.mkdir()
        assert content(shelf.catalog, version, folder) == expected(model, client_programs), how
        paths = [artifact.path for artifact in shelf.catalog.artifacts(version)]
        assert find_model_folder(paths, Inputs.of(version)) == "mymodel"


@pytest.mark.filterwarnings("ignore")  # MLflow warns of itself when it saves a model
def test_what_log_model_registers_has_the_runs_other_files(shelf, client_programs):
    mlflow.set_tracking_uri(shelf.client.tracking_uri)

    class Echo(mlflow.pyfunc.PythonModel):
        def predict(self, model_input: list[str]) -> list[str]:
            return model_input

    with mlflow.start_run(experiment_id=shelf.experiment()):
        mlflow.log_artifacts(str(client_programs), "client")
        mlflow.pyfunc.log_model(
            name="mymodel", python_model=Echo(), registered_model_name="by log_model", pip_requirements=["mlflow"]
        )
    version = shelf.catalog.find("by log_model", "1")
    paths = {artifact.path for artifact in shelf.catalog.artifacts(version)}
    assert {"client/app.py", "mymodel/MLmodel", "mymodel/python_env.yaml", "mymodel/requirements.txt"} <= paths


def test_a_copy_keeps_its_files_when_the_first_version_is_deleted(shelf, model):
    first = shelf.in_run((model, "mymodel"))
    copy = shelf.client.copy_model_version(f"models:/{first.name}/1", f"{first.name}-kept")
    before = shelf.catalog.artifacts(shelf.catalog.find(copy.name, "1"))
    shelf.client.delete_registered_model(first.name)
    assert shelf.catalog.artifacts(shelf.catalog.find(copy.name, "1")) == before


def test_a_logged_model_without_a_run_is_a_version_too(any_shelf, model):
    logged = any_shelf.logged_model(model, "lonely", None)
    version = any_shelf.version(f"models:/{logged}", model_id=logged)
    assert version.run_id == ""
    assert {artifact.path.partition("/")[0] for artifact in any_shelf.catalog.artifacts(version)} == {"lonely"}


def test_a_file_in_both_run_and_logged_model_counts_once_if_it_is_the_same(shelf, model):
    run = shelf.run((model, "mymodel"))
    logged = shelf.logged_model(model, "mymodel", run)
    version = shelf.version(f"models:/{logged}", model_id=logged, run_id=run)
    artifacts = shelf.catalog.artifacts(version)
    assert len({artifact.path for artifact in artifacts}) == len(artifacts) == 5
    assert all(logged in artifact.root for artifact in artifacts)


@pytest.mark.parametrize("text", ["numpx\n", "numpy==2\n"], ids=["same size", "another size"])
def test_two_different_files_at_one_path_are_refused(shelf, model, tmp_path, text):
    other = model_folder(tmp_path / "other")
    (other / "requirements.txt").write_text(text)
    run = shelf.run((other, "mymodel"))
    logged = shelf.logged_model(model, "mymodel", run)
    version = shelf.version(f"models:/{logged}", model_id=logged, run_id=run)
    with pytest.raises(InvalidVersion, match=r"two different files at 'mymodel/requirements.txt'"):
        shelf.catalog.artifacts(version)


def test_of_several_models_the_source_names_one_or_a_tag_has_to(shelf, model):
    version = shelf.in_run((model, "one"), (model, "two"))
    paths = [artifact.path for artifact in shelf.catalog.artifacts(version)]
    assert find_model_folder(paths, Inputs.of(version)) == "one"
    of_the_run = shelf.version(version.source.removesuffix("/one"), run_id=version.run_id)
    with pytest.raises(InvalidVersion, match="'one', 'two'"):
        find_model_folder(paths, Inputs.of(of_the_run))


def test_a_version_without_artifacts_is_refused(shelf):
    run = shelf.run()
    version = shelf.version(f"{shelf.client.get_run(run).info.artifact_uri}/m", run_id=run)
    with pytest.raises(InvalidVersion, match="has no artifacts"):
        shelf.catalog.artifacts(version)


def test_a_run_that_is_gone_is_said(shelf, model, monkeypatch):
    version = shelf.in_run((model, "mymodel"))
    gone = version.model_copy(update={"run_id": "0" * 32, "source": f"runs:/{'0' * 32}/mymodel"})
    with pytest.raises(InvalidVersion, match="no longer exists"):
        shelf.catalog.artifacts(gone)


def test_an_artifact_that_is_gone_is_said(any_shelf, model, tmp_path):
    version = any_shelf.in_run((model, "mymodel"))
    artifact = any_shelf.catalog.artifacts(version)[0].model_copy(update={"remote": "mymodel/nowhere"})
    with pytest.raises(InvalidVersion, match="Could not download"):
        any_shelf.catalog.download(artifact, tmp_path / "file")
    assert not list(tmp_path.glob("*file*"))


def test_an_artifact_that_comes_short_is_not_kept(shelf, model, tmp_path):
    version = shelf.in_run((model, "mymodel"))
    artifact = shelf.catalog.artifacts(version)[0]
    wrong = artifact.model_copy(update={"size": (artifact.size or 0) + 1})
    with pytest.raises(Exception, match=rf"came with {artifact.size} bytes instead of {wrong.size}"):
        shelf.catalog.download(wrong, tmp_path / "file")
    assert not list(tmp_path.glob("*file*"))


# ---- links in a store whose folder is on this machine


@pytest.mark.parametrize("target", ["/etc/passwd", "requirements.txt", ".", "nowhere"])
def test_a_link_is_refused_wherever_it_leads(file_shelf, model, target):
    version = file_shelf.in_run((model, "mymodel"))
    folder = file_shelf.client.get_run(version.run_id).info.artifact_uri
    (file_shelf_path(folder) / "mymodel" / "leak").symlink_to(target)
    with pytest.raises(InvalidVersion, match="'mymodel/leak' is a link"):
        file_shelf.catalog.artifacts(version)


@pytest.mark.parametrize("where", ["mymodel/requirements.txt", "mymodel"])
def test_a_link_put_there_after_the_listing_is_refused(file_shelf, model, tmp_path, where):
    version = file_shelf.in_run((model, "mymodel"))
    artifact = next(a for a in file_shelf.catalog.artifacts(version) if a.path == "mymodel/requirements.txt")
    path = file_shelf_path(artifact.root) / where
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(InvalidVersion, match="links are not followed"):
        file_shelf.catalog.download(artifact, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def file_shelf_path(uri):
    return Path(local_file_uri_to_path(uri))


# ---- finding and listing


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "With Capitals and spaces",
        "dots.in.it",
        "Ünïcode 模型",
        "line\nbreak",
        "$(touch x); `y` 'z' \"q\"",
        "q?x#y%20z&w=1",
        "n" * 200,
    ],
)
def test_any_name_is_found_by_number_and_by_alias(shelf, model, name):
    version = shelf.in_run((model, "mymodel"), name=name)
    shelf.client.set_registered_model_alias(name, "champion", version.version)
    assert shelf.catalog.find(name, "@champion") == shelf.catalog.find(name, version.version)
    assert shelf.catalog.find(name, f"0{version.version}").name == name
    assert version.created_ms == shelf.client.get_model_version(name, version.version).creation_timestamp
    assert shelf.catalog.artifacts(version)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("known", "99"),
        ("unknown", "1"),
        ("known", "@nobody"),
        ("unknown", "@nobody"),
        ("known", "one"),
        ("known", ""),
        ("known", "1; DROP"),
        ("a/b", "1"),
        ("", "1"),
    ],
)
def test_what_is_not_there_is_not_found(shelf, name, version):
    try:
        shelf.catalog.find("known", "1")
    except VersionNotFound:
        shelf.version("s3://bucket/x", name="known")
    with pytest.raises(VersionNotFound):
        shelf.catalog.find(name, version)


def test_a_prompt_is_no_model(shelf):
    shelf.client.register_prompt("a-prompt", "Say {{word}}", tags={TARGET: "true"})
    with pytest.raises(VersionNotFound):
        shelf.catalog.find("a-prompt", "1")
    assert "a-prompt" not in {version.name for version in shelf.catalog.tagged(TARGET)}


@pytest.mark.parametrize("which", ["shelf", "file_shelf"])
def test_tagged_lists_every_page_in_order_and_whatever_the_case(request, which):
    shelf = request.getfixturevalue(which)
    tag = f"TARGET.OF-{which}"
    values = ["true", "True", "TRUE", "tRuE", "false", "yes", "", "1"]
    made = [
        shelf.version("s3://bucket/x", tags={tag: value}, name=f"{which}-{number % 3}")
        for number, value in enumerate(values)
    ]
    shelf.version("s3://bucket/x", tags={"ANOTHER": "true"})
    wanted = sorted((version.name, int(version.version)) for version in made[:4])
    for size in (1, 3, 500):
        catalog = MlflowCatalog(shelf.client.tracking_uri, page_size=size)
        found = [(version.name, int(version.version)) for version in catalog.tagged(tag)]
        assert found == wanted
    listed = next(version for version in shelf.catalog.tagged(tag) if version == made[0])
    assert listed.source_id() == shelf.catalog.find(made[0].name, made[0].version).source_id()


def test_a_deleted_version_is_a_gap(shelf):
    versions = [shelf.version("s3://bucket/x", tags={"GAP": "true"}, name="with a gap") for _ in range(3)]
    shelf.client.delete_model_version("with a gap", "2")
    assert [version.version for version in shelf.catalog.tagged("GAP")] == ["1", "3"]
    with pytest.raises(VersionNotFound):
        shelf.catalog.set_tags(versions[1], {"a": "b"})


def test_a_server_that_cannot_search_by_tag_is_listed_whole(shelf, monkeypatch):
    shelf.version("s3://bucket/x", tags={"OLD": "True"}, name="on an old server")
    real = shelf.client.search_model_versions
    queries = []

    def without_ilike(filter_string=None, **options):
        queries.append(filter_string)
        # What a server answers to a comparison it does not know.
        return real(filter_string.replace("ILIKE", "NOPE") if filter_string else filter_string, **options)

    catalog = MlflowCatalog(shelf.client.tracking_uri)
    monkeypatch.setattr(catalog.client, "search_model_versions", without_ilike)
    assert [version.name for version in catalog.tagged("OLD")] == ["on an old server"]
    assert queries == ["tags.`OLD` ILIKE 'true'", None]


def test_tags_are_set_and_others_stay(shelf):
    version = shelf.version("s3://bucket/x", tags={"kept": "1", "changed": "1"})
    shelf.catalog.set_tags(version, {"changed": "2", "publish.x.error": "", "new": "é\n"})
    tags = shelf.catalog.find(version.name, "1").tags
    assert tags == {"kept": "1", "changed": "2", "publish.x.error": "", "new": "é\n"}

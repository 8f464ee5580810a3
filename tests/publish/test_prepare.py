"""What is refused before anything large is downloaded, and what is said."""

from __future__ import annotations

import tarfile
from pathlib import Path
from urllib.parse import unquote

import pytest

from builder.errors import ExitCode, InvalidVersion
from builder.models.context import listing_digest
from builder.publish import plan as preview
from builder.publish import publish
from builder.settings import Settings
from tests.servers.forwarding import forwarding
from tests.servers.small import small_files
from tests.versions import MLMODEL, register

NEARLY = [
    "templates/Dockerfile",
    "templates/dockerfile.template",
    "Templates/Dockerfile.template",
    "mymodel/templates/Dockerfile.template",
    "Dockerfile.template",
    "templates/Dockerfile.jinja2",
]


def refused(settings, function=publish):
    with pytest.raises(InvalidVersion) as caught:
        function(settings)
    assert caught.value.exit_code == ExitCode.DATA
    return caught.value


@pytest.mark.parametrize("path", NEARLY)
def test_a_dockerfile_under_a_name_that_is_nearly_right_is_an_error(small, small_settings, path):
    model = small(files={path: "FROM scratch\n"})
    right = "templates/Dockerfile.j2" if "jinja" in path else "templates/Dockerfile.template"
    for function in (preview, publish):
        error = refused(small_settings(model), function)
        assert repr(path) in error.what
        assert right in error.what
        assert "MODEL_DOCKERFILE" in error.remedy
    assert path in model.outcome()["error"]


def test_a_version_can_say_that_it_has_no_dockerfile(small, small_settings):
    files = {"templates/Dockerfile": "FROM scratch\n", "templates/Dockerfile.template": "FROM scratch\n"}
    model = small(files=files, tags={"MODEL_DOCKERFILE": "None"})
    assert publish(small_settings(model)).changed
    model = small(tags={"MODEL_DOCKERFILE": "templates/Dockerfile"})
    assert "MODEL_DOCKERFILE" in refused(small_settings(model)).what


def test_an_operator_who_wants_wheels_gets_them(small, small_settings, caplog):
    model = small(files={"templates/Dockerfile": "FROM scratch\n"})
    assert publish(small_settings(model, BUILD_METHOD="wheels")).changed
    assert "templates/Dockerfile" in caplog.text


def test_a_templates_folder_that_is_not_there_is_an_error(small, small_settings):
    model = small(files={"deploy/Dockerfile.template": "FROM scratch\n"}, tags={"MODEL_TEMPLATES_FOLDER": "deploi"})
    error = refused(small_settings(model))
    assert "deploy/Dockerfile.template" in error.what
    model = small(tags={"MODEL_TEMPLATES_FOLDER": "deploi"})
    assert "'deploi'" in refused(small_settings(model)).what


def downloads(mlflow_server, settings, function=publish):
    """Publish through a proxy; return the artifacts that were downloaded, in order, and the error if there was one."""
    with forwarding(mlflow_server.uri.partition("://")[2]) as proxy:
        environ = {**settings, "MLFLOW_TRACKING_URI": f"http://{proxy.host}"}
        error = None
        try:
            function(Settings.from_environ(environ))
        except InvalidVersion as caught:
            error = caught
        asked = [unquote(each.path.partition("?")[0]) for each in proxy.seen if each.method == "GET"]
    # …/mlflow-artifacts/artifacts/<experiment>/<run>/artifacts/<path>
    files = [path.split("/artifacts/", 2)[2] for path in asked if path.count("/artifacts/") > 1]
    return files, error


BESIDE = {"checkpoints/one.bin": "x" * 5000, "mymodel/large.bin": "x" * 5000, "mymodel/wheels/readme.txt": "x"}


def test_without_a_dockerfile_only_model_and_client_are_downloaded(small, small_environ, mlflow_server, tmp_path):
    model = small(files=BESIDE)
    got, error = downloads(mlflow_server, small_environ(model))
    assert error is None
    assert set(got) == {path for path in small_files(**BESIDE) if not path.startswith("checkpoints")}
    assert not (tmp_path / "workspace/description").exists()


def test_a_requirement_is_refused_before_the_weights_are_downloaded(small, small_environ, mlflow_server, tmp_path):
    model = small("small-app==9\n", files=BESIDE)
    got, error = downloads(mlflow_server, small_environ(model))
    assert "small-app==9" in str(error)
    assert "mymodel/MLmodel" in got
    assert not {"checkpoints/one.bin", "mymodel/large.bin"} & set(got)
    assert not (tmp_path / "workspace/description").exists()


def test_a_file_beside_the_model_counts_among_the_artifacts(small, small_settings):
    model = small(files=BESIDE)
    assert publish(small_settings(model)).changed
    plan = preview(small_settings(model), rebuild=True)
    assert plan.observed_annotations["io.modelimage.artifacts-digest"] == str(listing_digest(plan.artifacts))
    assert "checkpoints/one.bin" in {artifact.path for artifact in plan.artifacts}
    model.set_tag("MODEL_PLATFORMS", "linux/amd64,linux/arm64")
    assert publish(small_settings(model)).platforms == ("linux/amd64", "linux/arm64")


SERVED = {"mymodel/requirements.txt": "small-app\n", "client/app.py": None}
NO_ENTRY = {"MODEL_ENTRY_POINT": ""}


def test_a_model_that_no_server_can_load_is_refused_before_the_weights_are_downloaded(
    small, small_environ, mlflow_server
):
    other = "flavors:\n  my_own_flavor: {data: x}\n"
    model = small(files={**BESIDE, "mymodel/MLmodel": other, "client/app.py": None}, tags=NO_ENTRY)
    got, error = downloads(mlflow_server, small_environ(model))
    assert "python_function" in error.what
    assert "my_own_flavor" in error.what
    assert "client" in error.remedy
    assert "mymodel/large.bin" not in got
    model = small(files={**BESIDE, "mymodel/MLmodel": f"{other}python_version: 3.11\n", "mymodel/python_env.yaml": "python: 3.11.2\n"})  # fmt: skip
    _, error = downloads(mlflow_server, small_environ(model))
    assert error is None


def test_a_file_that_mlmodel_names_and_that_is_missing_is_refused_before_the_weights(
    small, small_environ, mlflow_server
):
    wrong = MLMODEL + "    model_code_path: C:\\Users\\me\\gone.py\n"
    model = small(files={**BESIDE, "mymodel/MLmodel": wrong, "client/app.py": None}, tags=NO_ENTRY)
    got, error = downloads(mlflow_server, small_environ(model), preview)
    assert "gone.py" in error.what
    assert "mymodel/large.bin" not in got


def test_a_path_of_windows_is_repaired_in_the_image(small, small_settings, crane, tmp_path):
    files = {
        "mymodel/model.py": "x = 1\n",
        "mymodel/MLmodel": MLMODEL + "    model_code_path: C:\\Users\\me\\model.py\n",
    }
    published = publish(small_settings(small(files=files)))
    crane("export", "--platform", "linux/amd64", str(published.reference), str(tmp_path / "image.tar"))
    with tarfile.open(tmp_path / "image.tar") as image:
        text = image.extractfile("app/mymodel/MLmodel").read().decode()
    assert text == MLMODEL + '    model_code_path: "model.py"\n'


@pytest.mark.parametrize("folder", ["my model", "modell_für_eu", "x'y\"$(z)"])
def test_a_folder_may_be_called_as_one_likes_where_no_dockerfile_is_rendered(
    mlflow_server, small_settings, crane, tmp_path, folder
):
    def files(where):
        return {path.replace("mymodel/", f"{where}/"): content for path, content in small_files().items()}

    model = register(mlflow_server.uri, files(folder), folder=folder)
    published = publish(small_settings(model))
    crane("export", "--platform", "linux/amd64", str(published.reference), str(tmp_path / "image.tar"))
    with tarfile.open(tmp_path / "image.tar") as image:
        assert f"app/{folder}/MLmodel" in image.getnames()
    # By its tag, too.
    model = register(mlflow_server.uri, files(folder), folder=folder, tags={"MODEL_FOLDER": folder})
    assert publish(small_settings(model)).changed
    template = {"templates/Dockerfile.template": "FROM scratch\nCOPY $model_folder /m\n"}
    for tags in ({}, {"MODEL_FOLDER": folder}):
        model = register(mlflow_server.uri, {**files(folder), **template}, folder=folder, tags=tags)
        assert "Dockerfile" in refused(small_settings(model)).what


def test_of_two_models_in_a_run_the_one_that_was_registered_is_published(small, small_settings, crane, tmp_path):
    model = small(files={"candidate/MLmodel": MLMODEL, "candidate/requirements.txt": "nobody-has-this\n"})
    published = publish(small_settings(model))
    crane("export", "--platform", "linux/amd64", str(published.reference), str(tmp_path / "image.tar"))
    with tarfile.open(tmp_path / "image.tar") as image:
        assert "app/mymodel/MLmodel" in image.getnames()
        assert "app/candidate/MLmodel" not in image.getnames()


@pytest.mark.parametrize("name", ["data\\part.bin", "C:\\x", "%2e%2e%2fx"])
def test_an_artifact_that_mlflow_does_not_take_is_named(small, small_settings, mlflow_server, name):
    model = small()
    (folder,) = Path(mlflow_server.artifacts).glob(f"**/{model.run_id}/artifacts/mymodel")
    (folder / name).write_text("x")
    error = refused(small_settings(model))
    assert repr(f"mymodel/{name}") in error.what
    assert "another name" in error.remedy

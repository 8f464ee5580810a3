"""Registering: checked first, in the layout and with the tags that publishing reads."""

from __future__ import annotations

import os

import pytest

from builder.errors import BuilderError, InvalidSettings, InvalidVersion, UsageError
from builder.models import Inputs
from builder.models.context import write_context
from builder.models.register import register, register_model_object
from builder.settings import CatalogSettings
from tests.models.models import TARGET


@pytest.fixture
def templates(tmp_path):
    folder = tmp_path / "some templates"
    folder.mkdir()
    (folder / "Dockerfile.template").write_text("FROM scratch\n")
    return folder


def nothing_was_sent(shelf, name):
    experiments = [found.experiment_id for found in shelf.client.search_experiments()]
    runs = shelf.client.search_runs(experiments, f"attributes.run_name = '{name}'")
    return not runs and not shelf.client.search_model_versions(f"name = '{name}'")


def test_a_registered_version_has_the_layout_and_the_tags(any_shelf, model, client_programs, templates, tmp_path):
    shelf = any_shelf
    first = register(shelf.catalog, model, name=f"registered {id(shelf)}")
    assert first.tags == {"MODEL_FOLDER": "mymodel", TARGET: "true"}
    second = register(
        shelf.catalog,
        model,
        name=first.name,
        client=client_programs,
        templates=templates,
        entry_point="app.py",
        command_line="python app.py --port=8080",
        platforms="linux/amd64,linux/arm64",
        base_image="python:3.11-slim",
        experiment=f"experiment {id(shelf)}",
        target_tag="EXTERNAL_TARGET_OTHER",
        select=False,
    )
    assert (first.version, second.version) == ("1", "2")
    assert second.tags == {
        "MODEL_FOLDER": "mymodel",
        "MODEL_CLIENT_FOLDER": "client",
        "MODEL_TEMPLATES_FOLDER": "templates",
        "MODEL_ENTRY_POINT": "app.py",
        "MODEL_EXECUTE_PATH": "python app.py --port=8080",
        "MODEL_PLATFORMS": "linux/amd64,linux/arm64",
        "MODEL_BASE_IMAGE": "python:3.11-slim",
    }
    assert Inputs.of(second).entry_point == "app.py"
    write_context(shelf.catalog, shelf.catalog.artifacts(second), tmp_path / "context")
    assert sorted(path.name for path in (tmp_path / "context").iterdir()) == ["client", "mymodel", "templates"]
    run = shelf.client.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert shelf.client.get_experiment(run.info.experiment_id).name == f"experiment {id(shelf)}"


def test_the_target_tag_is_that_of_the_settings(shelf, model):
    environ = {"MLFLOW_TRACKING_URI": shelf.client.tracking_uri, "TARGET_TAG": "EXTERNAL_TARGET_MINE"}
    version = register(CatalogSettings.from_environ(environ), model, name="by settings")
    assert version.tags["EXTERNAL_TARGET_MINE"] == "true"
    assert [found.name for found in shelf.catalog.tagged("EXTERNAL_TARGET_MINE")] == ["by settings"]


BAD_OPTIONS = {
    "an entry point with a quote": {"entry_point": 'a".py'},
    "an entry point that is not there": {"entry_point": "other.py"},
    "a command line with a substitution": {"command_line": "$(touch x)"},
    "a command line of two": {"command_line": "a\nRUN b"},
    "platforms that are none": {"platforms": "linux"},
    "a base image with a line break": {"base_image": "a\nRUN b"},
    "an empty name": {"name": " "},
}


@pytest.mark.parametrize("options", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_tags_that_could_not_be_published_are_refused_first(shelf, model, client_programs, options):
    name = f"refused {len(options)}"
    with pytest.raises(InvalidVersion):
        register(shelf.catalog, model, client=client_programs, **{"name": name, **options})
    assert nothing_was_sent(shelf, name)


def replace(path, make):
    """Put what `make` makes in the place of a file."""
    path.rename(path.with_name("moved"))
    make(path)


SPOILED = {
    "no MLmodel": lambda model, client, templates: (model / "MLmodel").unlink(),
    "no such folder": lambda model, client, templates: client.rename(client.with_name("moved")),
    "an empty folder": lambda model, client, templates: (templates / "Dockerfile.template").unlink(),
    "a link": lambda model, client, templates: (client / "leak").symlink_to("/etc/passwd"),
    "a link to a folder": lambda model, client, templates: (client / "leak").symlink_to("/etc"),
    "MLmodel is a link": lambda model, client, templates: replace(
        model / "MLmodel", lambda path: path.symlink_to("moved")
    ),
    "a pipe": lambda model, client, templates: os.mkfifo(model / "pipe"),
    "a line break in a name": lambda model, client, templates: (client / "a\nb").touch(),
    "a name that is not NFC": lambda model, client, templates: (client / "cafe\u0301").touch(),
    "a folder that is a file": lambda model, client, templates: replace(templates, lambda path: path.touch()),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_folders_that_could_not_be_published_are_refused_first(shelf, model, client_programs, templates, kind):
    SPOILED[kind](model, client_programs, templates)
    with pytest.raises(InvalidVersion):
        register(shelf.catalog, model, name=kind, client=client_programs, templates=templates)
    assert nothing_was_sent(shelf, kind)


def test_templates_are_checked_with_what_they_will_see(shelf, model, client_programs, templates):
    seen = []

    def refuse(version, folder):
        files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
        seen.append((version, files))
        message = "no such variable"
        raise InvalidVersion(message)

    (client_programs / "sub").mkdir()
    (client_programs / "sub" / "large").write_text("x")
    with pytest.raises(InvalidVersion, match="no such variable"):
        register(
            shelf.catalog, model, name="unrendered", client=client_programs, templates=templates, check_templates=refuse
        )
    ((version, files),) = seen
    assert version.tags["MODEL_TEMPLATES_FOLDER"] == "templates"
    assert files["templates/Dockerfile.template"] == "FROM scratch\n"
    assert files["mymodel/requirements.txt"] == "numpy\n"
    assert files["client/sub/large"] == ""
    assert nothing_was_sent(shelf, "unrendered")


@pytest.mark.parametrize("name", ["a#b.txt", "a?b.txt", "%41.txt"])
def test_a_name_that_does_not_survive_mlflow_is_refused(shelf, model, name):
    (model / name).write_text("x")
    with pytest.raises(InvalidVersion):
        register(shelf.catalog, model, name="lost on the way")
    assert not shelf.client.search_model_versions("name = 'lost on the way'")


def test_nothing_is_printed(shelf, model, capfd):
    register(shelf.catalog, model, name="quiet")
    assert capfd.readouterr().out == ""


def test_a_run_whose_model_cannot_be_registered_has_failed(shelf, model):
    with pytest.raises(InvalidVersion, match="register model 'a/b'"):
        register(shelf.catalog, model, name="a/b", experiment="in vain")
    experiment = shelf.client.get_experiment_by_name("in vain")
    (run,) = shelf.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"


# ---- live models


@pytest.mark.filterwarnings("ignore")  # MLflow and scikit-learn warn of themselves
def test_a_live_model_is_saved_and_registered(shelf):
    from sklearn.linear_model import LinearRegression

    model = LinearRegression().fit([[1], [2]], [1, 2])
    version = register_model_object(
        shelf.catalog, model, flavor="sklearn", name="live", save={"pip_requirements": ["scikit-learn"]}, select=False
    )
    paths = {artifact.path for artifact in shelf.catalog.artifacts(version)}
    assert {"mymodel/MLmodel", "mymodel/requirements.txt", "mymodel/python_env.yaml"} <= paths
    assert version.tags == {"MODEL_FOLDER": "mymodel"}


@pytest.mark.parametrize(
    ("flavor", "error"),
    [("../x", UsageError), ("", UsageError), ("nosuchflavor", InvalidSettings), ("tracking", InvalidSettings)],
)
def test_an_unknown_flavor_is_refused(shelf, flavor, error):
    with pytest.raises(error):
        register_model_object(shelf.catalog, object(), flavor=flavor, name="x")


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_its_flavor_cannot_save(shelf):
    with pytest.raises(BuilderError, match=r"mlflow\.sklearn could not save"):
        register_model_object(shelf.catalog, lambda: None, flavor="sklearn", name="x")

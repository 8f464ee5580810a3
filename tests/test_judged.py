"""What is refused before anything large is downloaded, and what is said."""

from __future__ import annotations

import pytest

from builder.errors import ExitCode, InvalidVersion
from builder.publish import publish
from builder.survey import preview

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

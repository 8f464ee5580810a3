"""Settings: everything wrong is said at once, and no secret is shown."""

from __future__ import annotations

import pytest

from builder.errors import ExitCode, InvalidSettings
from builder.masking import masked
from builder.reference import Platform
from builder.settings import BuildSettings, CatalogSettings, DoctorSettings, ListenSettings, Settings

GOOD = {"MLFLOW_TRACKING_URI": "http://mlflow.example.com", "REGISTRY_URL": "quay.io/domino"}


def test_what_is_missing_is_named_at_once():
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environ({}, ("MODEL_NAME", "MODEL_VERSION"))
    text = str(caught.value)
    for name in ("MODEL_NAME", "MODEL_VERSION", "MLFLOW_TRACKING_URI", "REGISTRY_URL"):
        assert f"{name} is missing" in text
    assert caught.value.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("REGISTRY_URL", "https://quay.io/domino", "such as quay.io/domino"),
        ("REGISTRY_URL", "quay.io/Domino", "lower-case"),
        ("TARGET_PLATFORMS", "amd64", "linux/amd64"),
        ("TARGET_PLATFORMS", ",", "names no platform"),
        ("TARGET_TAG", "a b", "a tag's name"),
        ("BUILD_METHOD", "magic", "auto, dockerfile or wheels"),
        ("BUILD_ENGINE", "docker", "auto, kaniko or buildah"),
        ("BUILD_TIMEOUT", "-1", "positive number of seconds"),
        ("BUILD_TIMEOUT", "soon", "positive number of seconds"),
        ("BUILD_CACHE", "http://x", "a repository"),
        ("BASE_IMAGE", "python:{version}", "{python_version}"),
        ("BASE_IMAGE", "python\nRUN id", "{python_version}"),
        ("SSL_CERT_FILE", "/nonexistent/ca.pem", "not a readable file"),
        ("PIP_CONFIG_FILE", "/nonexistent/pip.conf", "not a readable file"),
        ("BUILD_DOCKER_CONFIG", "/nonexistent", "not a readable folder"),
        ("SECRETS_DIR", "/nonexistent", "cannot be read"),
        ("TRUST_DOCKERFILE_AUTHORS", "perhaps", "true or false"),
        ("SWEEP_ATTEMPTS", "0", "positive"),
        ("LOG_FORMAT", "xml", "auto, text or json"),
        ("LOG_LEVEL", "loud", "debug, info"),
        ("REGISTRY_USER", "me", "REGISTRY_TOKEN is missing"),
        ("REGISTRY_TOKEN", "t0ken-of-mine", "REGISTRY_USER is missing"),
        ("MLFLOW_TRACKING_URI", "mlflow.example.com", "the scheme is missing"),
        ("MLFLOW_TRACKING_URI", "mlflow.example.com/path", "the scheme is missing"),
        ("MLFLOW_TRACKING_URI", "localhost:5000", "the scheme is missing"),
        ("MLFLOW_TRACKING_URI", "user:pass-of-mine@mlflow.example.com:5000", "the scheme is missing"),
        ("MLFLOW_TRACKING_URI", "//mlflow.example.com", "the scheme is missing"),
        ("MLFLOW_TRACKING_URI", "https://", "the host is missing"),
        ("MLFLOW_REGISTRY_URI", "registry.example.com:443", "the scheme is missing"),
        ("TARGET_PLATFORMS", "linux/amd46", "is not a platform"),
    ],
)
def test_what_is_malformed_is_named_with_its_form(name, value, said):
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environ({**GOOD, name: value})
    assert name in str(caught.value)
    assert said in str(caught.value)
    assert "of-mine" not in str(caught.value)


def test_everything_malformed_is_named_at_once():
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environ(
            {"REGISTRY_URL": "a://b", "BUILD_TIMEOUT": "x", "SSL_CERT_FILE": "/nonexistent", "REGISTRY_USER": "me"}
        )
    named = [name for name in ("MLFLOW_TRACKING_URI", "REGISTRY_URL", "BUILD_TIMEOUT", "SSL_CERT_FILE", "REGISTRY_TOKEN")
             if name in str(caught.value)]  # fmt: skip
    assert len(named) == 5


def test_defaults():
    settings = Settings.from_environ(GOOD)
    assert settings.target == "pltr_foundry"
    assert settings.target_platforms == (Platform("linux", "amd64"),)
    assert settings.build_engine == "auto"
    assert not settings.trust_dockerfile_authors
    assert not settings.holds_credential


def test_empty_variables_count_as_not_set():
    assert Settings.from_environ({**GOOD, "BUILD_TIMEOUT": "", "REGISTRY_USER": ""}).build_timeout == 3600


def test_arguments_win_over_the_environment():
    settings = Settings.from_environ({**GOOD, "MODEL_NAME": "a"}, MODEL_NAME="b", MODEL_VERSION=None)
    assert (settings.model_name, settings.model_version) == ("b", "")


def test_secrets_come_from_files_and_the_environment_wins(tmp_path):
    (tmp_path / "REGISTRY_USER").write_text("me\n")
    (tmp_path / "REGISTRY_TOKEN").write_text("from-a-file\n")
    (tmp_path / "MLFLOW_TRACKING_TOKEN").write_text("mlflow-token")
    (tmp_path / "..data").mkdir()
    environ = {**GOOD, "SECRETS_DIR": str(tmp_path)}
    settings = Settings.from_environ(environ)
    assert settings.registry_token.get_secret_value() == "from-a-file"
    assert settings.mlflow_variables["MLFLOW_TRACKING_TOKEN"].get_secret_value() == "mlflow-token"
    assert settings.holds_credential
    assert Settings.from_environ({**environ, "REGISTRY_TOKEN": "x"}).registry_token.get_secret_value() == "x"


def test_secrets_are_masked_wherever_settings_are_printed():
    secrets = {
        "REGISTRY_USER": "me",
        "REGISTRY_TOKEN": "hidden-1",
        "DOMINO_USER_API_KEY": "hidden-2",
        "DOMINO_RUN_ID": "hidden-3",
        "MLFLOW_TRACKING_PASSWORD": "hidden-4",
        "PIP_INDEX_URL": "https://u:hidden-5@index.example.com/simple",
    }
    settings = Settings.from_environ({**GOOD, **secrets})
    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hidden" not in text
    assert "hidden" not in masked(" ".join(secrets.values()))


@pytest.mark.parametrize(
    "environ",
    [
        {"REGISTRY_TOKEN": "x", "REGISTRY_USER": "y"},
        {"MLFLOW_TRACKING_TOKEN": "x"},
        {"MLFLOW_TRACKING_URI": "https://me:secret@mlflow.example.com"},
        {"AWS_SECRET_ACCESS_KEY": "x"},
        {"DOMINO_USER_API_KEY": "x"},
    ],
)
def test_the_build_phase_knows_that_its_container_holds_a_credential(environ):
    assert BuildSettings.from_environ(environ).holds_credential


def test_a_docker_config_is_a_credential(tmp_path):
    environ = {"DOCKER_CONFIG": str(tmp_path)}
    assert not BuildSettings.from_environ(environ).holds_credential
    (tmp_path / "config.json").write_text("{}")
    assert BuildSettings.from_environ(environ).holds_credential
    assert BuildSettings.from_environ({"BUILD_DOCKER_CONFIG": str(tmp_path)}).holds_credential is False


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        ((".dockerconfigjson", "..data"), "", "'.dockerconfigjson'; mount the secret's key .dockerconfigjson as config.json"),
        (("config.jsn",), "", "it contains 'config.jsn'"),
        ((), "", "it is empty"),
        (("config.json",), "config.json", "which is a file"),
        ((), "gone", "does not exist"),
    ],
)  # fmt: skip
def test_a_docker_config_without_a_config_says_what_is_there(tmp_path, files, name, said):
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environ({**GOOD, "DOCKER_CONFIG": str(tmp_path / name)})
    assert caught.value.exit_code == ExitCode.CONFIG
    assert "config.json" in caught.value.what
    assert said in caught.value.what
    (tmp_path / "good").mkdir()
    (tmp_path / "good/config.json").write_text("{}")
    assert Settings.from_environ({**GOOD, "DOCKER_CONFIG": str(tmp_path / "good")}).docker_config


def test_the_folder_that_the_builder_image_names_may_be_empty():
    assert Settings.from_environ({**GOOD, "DOCKER_CONFIG": "/kaniko/.docker"}).docker_config


def test_the_build_phase_needs_neither_mlflow_nor_a_registry():
    assert not hasattr(BuildSettings.from_environ({}), "registry_token")


def test_registering_needs_no_registry():
    assert (
        CatalogSettings.from_environ({"MLFLOW_TRACKING_URI": "http://x"}).target_tag == "EXTERNAL_TARGET_PLTR_FOUNDRY"
    )


def test_lower_case_proxies_count():
    settings = Settings.from_environ({**GOOD, "https_proxy": "http://proxy:3128", "no_proxy": "localhost"})
    assert settings.proxies == {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost"}


@pytest.mark.parametrize(
    "uri",
    [
        "https://mlflow.example.com/path",
        "sqlite:////srv/mlflow.db",
        "postgresql+psycopg2://host/name",
        "file:///srv/mlruns",
        "file:mlruns",
        "/srv/mlruns",
        "./mlruns",
        "../mlruns",
        "databricks",
        "databricks://profile",
        "databricks-uc",
    ],
)
def test_what_mlflow_takes_for_its_server(uri):
    assert CatalogSettings.from_environ({"MLFLOW_TRACKING_URI": uri}).mlflow_tracking_uri == uri


@pytest.mark.parametrize("name", ["DOMINO_USER_API_KEY", "DOMINO_RUN_ID"])
def test_of_dominos_variables_one_is_enough(name):
    CatalogSettings.from_environ({**GOOD, name: "value-of-it"})


def test_every_problem_is_an_item_of_a_list():
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environ({"SWEEP_ATTEMPTS": "0"})
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "MLFLOW_TRACKING_URI",
        "REGISTRY_URL",
        "SWEEP_ATTEMPTS",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"STATUS_ACCESS": "token"},
        {"LISTEN_CERTIFICATE": "/nonexistent/tls.crt", "LISTEN_KEY": "/nonexistent/tls.key"},
        {"LISTEN_CERTIFICATE": "/nonexistent/tls.crt"},
    ],
    ids=["status page", "certificate", "half of it"],
)
def test_a_doctor_does_without_what_a_listener_alone_needs(changes):
    with pytest.raises(InvalidSettings):
        ListenSettings.from_environ({**GOOD, **changes})
    assert DoctorSettings.from_environ({**GOOD, **changes}).listen_port
    with pytest.raises(InvalidSettings, match="REGISTRY_USER is missing"):
        DoctorSettings.from_environ({**GOOD, **changes, "REGISTRY_TOKEN": "t0ken-of-mine"})

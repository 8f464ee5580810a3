"""Settings: the environment, read in one place, and the way to the network that it describes."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from builder.errors import BuilderError, InvalidSettings
from builder.masking import (
    PATH_VARIABLES,
    in_connection_string,
    in_text,
    in_urls,
    mask,
    mask_files,
    mask_secrets,
    one_line,
    url_credentials,
)
from builder.process import PREFIX
from builder.reference import BasePattern, Platform, Reference, Repository, parse_platforms, repository_component
from builder.urls import ArtifactUri, parse_roots


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How RUN steps and pulls reach the world; none of it stays in the image.

    Attributes:
        ca_bundle: file of CA certificates in PEM; None for the system's.
        pip_config: a pip.conf; None if there is none.
        proxies: HTTP_PROXY, HTTPS_PROXY, NO_PROXY that are set.
        index_variables: pip's and uv's index variables that are set; they may hold a credential.
        insecure_registries: hosts reached over plain HTTP, loopback not named.
        netrc: file of credentials by host, as pip and uv read it for package indexes; None if there is none.
    """

    ca_bundle: Path | None = None
    pip_config: Path | None = None
    proxies: Mapping[str, str] = field(default_factory=dict)
    index_variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    insecure_registries: frozenset[str] = frozenset()
    netrc: Path | None = None


# Variables of other programs that pass through us: to MLflow's client, to the engine's RUN steps.
_MLFLOW_VARIABLE = re.compile(
    r"MLFLOW_[A-Z0-9_]+|AWS_[A-Z0-9_]+|AZURE_[A-Z0-9_]+|GOOGLE_APPLICATION_CREDENTIALS|DATABRICKS_[A-Z0-9_]+"
)
_CREDENTIAL_VARIABLE = re.compile(
    r"[A-Z0-9_]*(?:TOKEN|PASSWORD|SECRET|API_KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL|CLIENT_CERT|CONNECTION_STRING)[A-Z0-9_]*"
    r"|(?:AWS|AZURE|DATABRICKS)_[A-Z0-9_]+|GCE_METADATA_HOST"
)
# The variables of clouds that hold no secret.
_PLAIN_VARIABLE = re.compile(
    r"AWS_(?:DEFAULT_)?REGION|AWS_CA_BUNDLE|AWS_ENDPOINT_URL[A-Z0-9_]*|AWS_DEFAULT_OUTPUT|AWS_MAX_ATTEMPTS|AWS_RETRY_MODE"
    r"|AWS_EC2_METADATA_DISABLED|AWS_STS_REGIONAL_ENDPOINTS|AZURE_AUTHORITY_HOST|DATABRICKS_HOST"
    r"|DOCKER_CREDENTIAL_GCR_CONFIG"  # the settings file of a credential helper in the Kaniko image
)
INDEX_VARIABLES = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_TRUSTED_HOST",
    "UV_INDEX",
    "UV_DEFAULT_INDEX",
    "UV_INDEX_URL",
    "UV_EXTRA_INDEX_URL",
    "UV_INDEX_STRATEGY",
    "UV_FIND_LINKS",
    "PIP_FIND_LINKS",
    "PIP_NO_INDEX",
)
# The variables by which podman finds its storage, and Docker's client its daemon.
_CONTAINER_VARIABLES = (
    "HOME",
    "XDG_RUNTIME_DIR",
    "DBUS_SESSION_BUS_ADDRESS",
    "DOCKER_HOST",
    "DOCKER_TLS_VERIFY",
    "DOCKER_CERT_PATH",
)
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
IN_IMAGE_WORKSPACE = Path("/kaniko/workspace")
_IN_IMAGE_MARK = Path("/kaniko/builder")
# The builder image always sets it, even if nothing is mounted there.
_IN_IMAGE_DOCKER_CONFIG = Path("/kaniko/.docker")
_MOST_NAMES = 20
_USERS = {"REGISTRY_TOKEN": "REGISTRY_USER", "MLFLOW_TRACKING_PASSWORD": "MLFLOW_TRACKING_USERNAME"}
_SECRET_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_MOST_SECRET_BYTES = 1 << 20
_SHORTEST_SECRET = 16


def _parsed(parse: Callable[[str], object]) -> BeforeValidator:
    """Return a validator that parses strings, and hands our errors on as pydantic expects them."""

    def validate(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return parse(value)
        except BuilderError as error:
            raise ValueError(error.what) from error

    return BeforeValidator(validate)


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _patterns(text: str) -> tuple[BasePattern, ...]:
    return tuple(map(BasePattern.parse, _list(text)))


LOG_FIELDS = ("model", "version", "target", "pod", "job", "attempt", "started")
_PLATFORMS = _parsed(parse_platforms)
_PATTERNS = _parsed(_patterns)
_LIST = _parsed(_list)
_REPOSITORY = _parsed(Repository.parse_prefix)
_REFERENCE = _parsed(Reference.parse)
_ARTIFACT_ROOTS = _parsed(parse_roots)


def _setting(
    variable: str, meaning: str, default: Any = ..., *, shown: str = "", form: str = ""
) -> Any:  # pydantic's Field is typed Any as well
    """Return a field read from `variable`.

    Args:
        variable: the environment variable's name.
        meaning: what it means, for the table of settings.
        default: the value if the variable is not set; without one, the setting is required.
        shown: the default as the table shows it, if the value itself is unclear.
        form: the expected form, for the error about a malformed value.
    """
    return Field(
        default, validation_alias=variable, description=meaning, json_schema_extra={"shown": shown, "form": form}
    )


class CommonSettings(BaseModel):
    """Settings of every phase: the way to the network, the workspace, how to log."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True, populate_by_name=True)

    ssl_cert_file: Path | None = _setting(
        "SSL_CERT_FILE", "CA bundle for every connection, RUN steps included.", None, shown="the system's"
    )
    http_proxy: str = _setting("HTTP_PROXY", "Proxy for HTTP, in every phase.", "")
    https_proxy: str = _setting("HTTPS_PROXY", "Proxy for HTTPS, in every phase.", "")
    no_proxy: str = _setting("NO_PROXY", "Hosts reached without a proxy.", "")
    insecure_registries: Annotated[frozenset[str], _LIST] = _setting(
        "INSECURE_REGISTRIES",
        "Registry hosts, separated by commas, reached over plain HTTP; loopback always is.",
        frozenset(),
        shown="none",
    )
    workspace: Path | None = _setting(
        "BUILDER_WORKSPACE",
        "Folder through which the phases hand over.",
        None,
        shown="/kaniko/workspace in the image, a private temporary folder elsewhere",
    )
    secrets_dir: Path | None = _setting(
        "SECRETS_DIR", "Folder with a file for each variable, as a Secret is mounted; the environment wins.", None
    )
    termination_log: Path = _setting(
        "TERMINATION_LOG",
        "File to which the outcome is written as JSON, if it exists: a Pod's termination message.",
        Path("/dev/termination-log"),
    )
    log_format: Literal["auto", "text", "json"] = _setting(
        "LOG_FORMAT", "Logs as `text` or `json`; `auto` is text on a terminal.", "auto", form="auto, text or json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "LOG_LEVEL", "The least severe log line shown.", "info", form="debug, info, warning or error"
    )
    # Derived from the environment, not a setting of its own.
    holds_credential: bool = False

    @property
    def proxies(self) -> dict[str, str]:
        """The proxy variables that are set, by their upper-case names."""
        values = zip(PROXY_VARIABLES, (self.http_proxy, self.https_proxy, self.no_proxy), strict=True)
        return {name: value for name, value in values if value}

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], require: Collection[str] = (), **overrides: object) -> Self:
        """Return the settings in an environment; from here on, all output masks their secrets.

        Args:
            environ: the environment, such as `os.environ`. Empty variables count as not set.
            require: variables that are required here although usually optional, such as MODEL_NAME.
            overrides: values by variable name, such as `MODEL_NAME="x"`, that override the environment; None counts as
                not given.

        Raises:
            InvalidSettings: a setting is missing or malformed; the error lists every one, with its expected form.
        """
        from_files = _secrets(environ.get("SECRETS_DIR", ""))
        values: dict[str, Any] = {**from_files, **{k: v for k, v in environ.items() if v}}
        for name in PROXY_VARIABLES:
            if environ.get(name.lower()):
                values.setdefault(name, environ[name.lower()])
        values.update({name: value for name, value in overrides.items() if value is not None})
        if not values.get("DOCKER_CONFIG"):
            home = Path(environ.get("HOME") or "/nonexistent") / ".docker"
            values["DOCKER_CONFIG"] = home if (home / "config.json").is_file() else None
        if not values.get("NETRC"):
            netrc = Path(environ.get("HOME") or "/nonexistent") / ".netrc"
            values["NETRC"] = netrc if netrc.is_file() else None
        values["index_variables"] = {name: values[name] for name in INDEX_VARIABLES if values.get(name)}
        values["mlflow_variables"] = {
            name: str(value)
            for name, value in values.items()
            if _MLFLOW_VARIABLE.fullmatch(name) and name != "MLFLOW_TRACKING_URI"
        }
        values["container_variables"] = {name: str(values[name]) for name in _CONTAINER_VARIABLES if values.get(name)}
        values["in_pod"] = bool(environ.get("KUBERNETES_SERVICE_HOST"))
        _mask(values, environ.get("HOME", ""), from_files)
        values["holds_credential"] = any(_is_credential(name, value) for name, value in values.items()) or bool(
            values["DOCKER_CONFIG"] and (Path(values["DOCKER_CONFIG"]) / "config.json").exists()
        )
        problems = [
            f"{name} is missing: {field.description}"
            for name in require
            for field in cls.model_fields.values()
            if field.validation_alias == name and not values.get(name)
        ]
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            problems += [_problem(cls, detail) for detail in error.errors()]
        problems += cls._problems(values)
        if problems:
            message = f"The settings cannot be used: {'; '.join(problems)}."
            remedy = "Correct these variables. docs/settings.md describes every setting."
            raise InvalidSettings(message, remedy=remedy, problems=problems)
        return settings

    @classmethod
    def _problems(cls, values: Mapping[str, Any]) -> list[str]:
        """Return the problems that pydantic cannot see, a sentence each: missing files, half of a pair."""
        return _unreadable("SSL_CERT_FILE", values, "file")

    @property
    def named_workspace(self) -> Path | None:
        """The workspace; None if it is a temporary folder."""
        return self.workspace or (IN_IMAGE_WORKSPACE if _IN_IMAGE_MARK.is_dir() else None)

    def workspace_or_temporary(self) -> tuple[Path, bool]:
        """Return the workspace, and whether it is a temporary folder of this process that it should remove."""
        named = self.named_workspace
        return (named, False) if named else (Path(tempfile.mkdtemp(prefix=PREFIX)), True)


class BuildSettings(CommonSettings):
    """Settings of the phase that runs an author's Dockerfile: no server, and at most a pull-only credential."""

    build_engine: Literal["auto", "kaniko", "buildah"] = _setting(
        "BUILD_ENGINE",
        "The engine that runs a Dockerfile: `kaniko`, `buildah`, or `auto` for the first one installed.",
        "auto",
        form="auto, kaniko or buildah",
    )
    build_timeout: Annotated[int, Field(gt=0)] = _setting(
        "BUILD_TIMEOUT", "Seconds that one platform's build may take.", 3600, form="a positive number of seconds"
    )
    build_cache: Annotated[Repository, _REPOSITORY] | None = _setting(
        "BUILD_CACHE",
        "Repository of the engine's layer cache. It is read with BUILD_DOCKER_CONFIG's credential.",
        None,
        form="a repository, such as quay.io/domino/build-cache",
    )
    build_docker_config: Path | None = _setting(
        "BUILD_DOCKER_CONFIG",
        "Folder of a Docker config.json for the pulls of the build phase (a private base image, the cache). A "
        "Dockerfile's RUN steps may be able to read it, so its credential must be pull-only.",
        None,
        shown="anonymous pulls",
    )
    pip_config_file: Path | None = _setting(
        "PIP_CONFIG_FILE", "pip.conf that RUN steps see as /etc/pip.conf; the image does not contain it.", None
    )
    trust_dockerfile_authors: bool = _setting(
        "TRUST_DOCKERFILE_AUTHORS",
        "Allows Kaniko in a container that also holds a credential.",
        default=False,
        form="true or false",
    )
    index_variables: dict[str, SecretStr] = Field(default_factory=dict)

    @classmethod
    def _problems(cls, values: Mapping[str, Any]) -> list[str]:
        return [
            *super()._problems(values),
            *_unreadable("PIP_CONFIG_FILE", values, "file"),
            *_unreadable("BUILD_DOCKER_CONFIG", values, "folder"),
        ]


class CatalogSettings(CommonSettings):
    """Settings for finding versions on MLflow and reading their inputs."""

    mlflow_tracking_uri: str = _setting(
        "MLFLOW_TRACKING_URI",
        "The MLflow server that holds the model registry. MLflow's own variables (MLFLOW_TRACKING_TOKEN, "
        "MLFLOW_TRACKING_USERNAME, AWS_… and so on) keep their meaning.",
        shown="required",
        form="a URI such as https://mlflow.example.com",
    )
    domino_user_api_key: SecretStr | None = _setting(
        "DOMINO_USER_API_KEY",
        "Sent to Domino's MLflow as X-Domino-Api-Key, except on loopback, where Domino's proxy adds its own. "
        "MLFLOW_TRACKING_TOKEN may be set instead.",
        None,
    )
    domino_run_id: SecretStr | None = _setting(
        "DOMINO_RUN_ID",
        "The Domino run that requests to MLflow belong to; sent as X-Domino-Execution with the API key or the token.",
        None,
    )
    target_tag: str = _setting(
        "TARGET_TAG",
        "The tag that selects versions (with the value `true`) and names the target.",
        "EXTERNAL_TARGET_PLTR_FOUNDRY",
        form="a tag's name of letters, digits, '_', '-' and '.'",
    )
    base_image: str = _setting(
        "BASE_IMAGE",
        "Base of the default template; `{python_version}` is the model's.",
        "docker.io/library/python:{python_version}-slim",
        form="an image reference; the only field it may have is {python_version}",
    )
    allowed_base_images: Annotated[tuple[BasePattern, ...], _PATTERNS] = _setting(
        "ALLOWED_BASE_IMAGES",
        "Patterns, separated by commas, of the base images that a version's tag MODEL_BASE_IMAGE may name: "
        "`[host[:port]/]path[:tag][@digest]`, each part compared with that part of the image's reference. `*` matches "
        "anything within a part, `quay.io/team/*` everything below `quay.io/team`. Without a tag, or with the tag "
        "`*`, every tag and digest of the repository is allowed; with any other tag, no digest is.",
        (),
        shown="none",
        form="patterns separated by commas, such as docker.io/library/python:3.*,quay.io/team/*",
    )
    allowed_artifact_roots: Annotated[tuple[ArtifactUri, ...], _ARTIFACT_ROOTS] = _setting(
        "ALLOWED_ARTIFACT_ROOTS",
        "Artifact folders, separated by commas, that versions may be read from with the publisher's credentials: URIs "
        "such as `s3://bucket/mlflow`, or paths. They replace the server's own artifact root; artifacts that the "
        "MLflow server serves itself (`mlflow-artifacts:`) are always allowed.",
        (),
        shown="the server's own artifact root",
        form="addresses of folders, such as s3://bucket/mlflow or /srv/mlflow, separated by commas",
    )
    version_timeout: Annotated[int, Field(gt=0)] = _setting(
        "VERSION_TIMEOUT",
        "Seconds that one version may take, without the engine's, which BUILD_TIMEOUT bounds.",
        7200,
        form="a positive number of seconds",
    )
    version_processor_time: Annotated[int, Field(gt=0)] = _setting(
        "VERSION_PROCESSOR_TIME",
        "Seconds of processor time that one version may take, including resolvers and compilers.",
        3600,
        form="a positive number of seconds",
    )
    version_memory: Annotated[ByteSize, Field(ge=256 << 20)] = _setting(
        "VERSION_MEMORY",
        "Memory that one version may take, including resolvers and compilers; never more than three quarters of the "
        "container's.",
        ByteSize(4 << 30),
        shown="`4GiB`",
        form="a size such as 4GiB, of at least 256MiB",
    )
    version_bytes: Annotated[ByteSize, Field(gt=0)] = _setting(
        "VERSION_BYTES",
        "Largest size of one version: of its artifacts, and of everything written for it to the workspace and the "
        "temporary folder.",
        ByteSize(256 << 30),
        shown="`256GiB`",
        form="a size such as 20GiB",
    )
    version_files: Annotated[int, Field(gt=0)] = _setting(
        "VERSION_FILES", "Largest number of artifacts of one version.", 100_000, form="a positive number"
    )
    mlflow_variables: dict[str, SecretStr] = Field(default_factory=dict)

    @field_validator("mlflow_tracking_uri")
    @classmethod
    def _tracking_uri_names_a_server(cls, value: str) -> str:
        if why := _no_server(value):
            raise ValueError(why)
        return value

    @field_validator("target_tag")
    @classmethod
    def _target_tag_is_a_tag(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", value):
            raise ValueError
        return value

    @field_validator("base_image")
    @classmethod
    def _base_image_has_known_fields(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._/:@-]+", value.replace("{python_version}", "3")):
            raise ValueError
        return value

    @property
    def target(self) -> str:
        """The target's name, after its tag: `EXTERNAL_TARGET_PLTR_FOUNDRY` is `pltr_foundry`."""
        return self.target_tag.lower().removeprefix("external_target_") or self.target_tag.lower()

    def component_of(self, model_name: str) -> str:
        """Return the last component of a model's repository; see `repository_component`."""
        return repository_component(model_name)

    @classmethod
    def _problems(cls, values: Mapping[str, Any]) -> list[str]:
        registry = values.get("MLFLOW_REGISTRY_URI")
        why = _no_server(str(registry)) if registry else ""
        return [
            *super()._problems(values),
            *(
                [f"MLFLOW_REGISTRY_URI is malformed ({why}): it should be a URI such as https://mlflow.example.com"]
                if why
                else []
            ),
        ]


class Settings(CatalogSettings, BuildSettings):
    """All that the environment decides. Frozen; secrets are masked in its repr and in JSON."""

    model_name: str = _setting("MODEL_NAME", "The registered model to publish.", "", shown="required by `publish`")
    model_version: str = _setting(
        "MODEL_VERSION", "Its version: a number, or an alias as `@champion`.", "", shown="required by `publish`"
    )
    registry_url: Annotated[Repository, _REPOSITORY] = _setting(
        "REGISTRY_URL",
        "Where images go: a registry's host and an optional namespace.",
        shown="required",
        form="a host and an optional namespace, such as quay.io/domino",
    )
    registry_user: str = _setting("REGISTRY_USER", "User for REGISTRY_URL's host, and for no other.", "")
    registry_token: SecretStr | None = _setting("REGISTRY_TOKEN", "Password or token of REGISTRY_USER.", None)
    docker_config: Path | None = _setting(
        "DOCKER_CONFIG",
        "Folder of a Docker config.json with registry credentials; credential helpers work.",
        None,
        shown="~/.docker if it exists",
    )
    gce_metadata_host: str = _setting(
        "GCE_METADATA_HOST",
        "The metadata server (on GKE `metadata.google.internal`) to ask for a credential of Google's registries, where "
        "nothing else names one. Likewise AWS_WEB_IDENTITY_TOKEN_FILE or AWS_CONTAINER_CREDENTIALS_FULL_URI for "
        "Amazon's, and AZURE_FEDERATED_TOKEN_FILE for Azure's, which these clouds set themselves.",
        "",
        shown="not asked",
    )
    target_platforms: Annotated[tuple[Platform, ...], _PLATFORMS] = _setting(
        "TARGET_PLATFORMS",
        "Platforms to publish for, separated by commas; a version's tag MODEL_PLATFORMS overrides it.",
        (Platform("linux", "amd64"),),
        shown="linux/amd64",
        form="platforms separated by commas, such as linux/amd64,linux/arm64",
    )
    build_method: Literal["auto", "dockerfile", "wheels"] = _setting(
        "BUILD_METHOD",
        "How the image is made: `dockerfile` runs the version's template, or the built-in one, with an engine; "
        "`wheels` assembles it without one; `auto` is `dockerfile` if the version has a template, else `wheels`.",
        "auto",
        form="auto, dockerfile or wheels",
    )
    wheel_layers: Annotated[Repository, _REPOSITORY] | None = _setting(
        "WHEEL_LAYERS",
        "Repository of the wheel layers and locks, at REGISTRY_URL's host. Write access to it puts code into every "
        "image.",
        None,
        shown="REGISTRY_URL/wheel-layers",
        form="a repository at REGISTRY_URL's host, such as quay.io/domino/wheel-layers",
    )
    resolve_as_of: Literal["registered", "now"] = _setting(
        "RESOLVE_AS_OF",
        "`registered` resolves requirements as of the time in MLmodel, if it is earlier than the version's creation, "
        "else as of that; `now` as of today.",
        "registered",
        form="registered or now",
    )
    wheel_bytecode: bool = _setting(
        "WHEEL_BYTECODE",
        "Whether wheel layers contain bytecode, so that containers start faster. It is made if the builder runs on the "
        "model's minor version of Python, or WHEEL_COMPILERS has an interpreter of it.",
        default=True,
        form="true or false",
    )
    wheel_compilers: Path | None = _setting(
        "WHEEL_COMPILERS",
        "A folder of interpreters that compile for other minor versions of Python than the builder's own, each as "
        "`3.9/bin/python3.9`.",
        None,
        shown="in the builder image `/kaniko/compilers`",
    )
    full_mlflow: bool = _setting(
        "FULL_MLFLOW",
        "Whether an image gets the whole `mlflow` if the model requires it, instead of the part that serving needs.",
        default=False,
        form="true or false",
    )
    allowed_indexes: Annotated[tuple[str, ...], _LIST] = _setting(
        "ALLOWED_INDEXES",
        "Addresses, separated by commas, of package indexes and wheels that a model's requirements may name; each "
        "allows everything below it, `*` allows any to which no credential is sent.",
        (),
        shown="those configured for pip or uv",
    )
    netrc: Path | None = _setting(
        "NETRC",
        "netrc file with credentials for package indexes. An entry is used for hosts in the addresses of indexes and "
        "in ALLOWED_INDEXES, `default` only for indexes.",
        None,
        shown="~/.netrc if it exists",
    )
    sweep_attempts: Annotated[int, Field(gt=0)] = _setting(
        "SWEEP_ATTEMPTS",
        "How often a sweep tries a failing version before it waits for the version to change.",
        3,
        form="a positive number",
    )
    sweep_parallel: Annotated[int, Field(gt=0)] = _setting(
        "SWEEP_PARALLEL",
        "In a cluster: how many Jobs of versions a sweep has at once.",
        4,
        form="a positive number",
    )
    sweep_backoff: Annotated[int, Field(ge=0)] = _setting(
        "SWEEP_BACKOFF",
        "In a cluster: seconds between an attempt at a version and the next; twice as long after each attempt that "
        "counts, up to a day.",
        300,
        form="a number of seconds",
    )
    sweep_wait: Annotated[int, Field(ge=0)] = _setting(
        "SWEEP_WAIT",
        "In a cluster: seconds for which a sweep goes on to make Jobs as others end, if there are more versions than "
        "SWEEP_PARALLEL. The next sweep does what is left.",
        600,
        form="a number of seconds",
    )
    job_start_timeout: Annotated[int, Field(gt=0)] = _setting(
        "JOB_START_TIMEOUT",
        "In a cluster: seconds after which a sweep ends a Job whose Pod does not start, such as one whose image cannot "
        "be pulled; the reason is recorded on the version.",
        900,
        form="a positive number of seconds",
    )
    attempt_id: str = _setting(
        "ATTEMPT_ID",
        "What the processes of one attempt share, such as the UID of their Job: the attempt is counted once, however "
        "many Pods it takes.",
        "",
        shown="each process is an attempt",
    )
    publish_force: bool = _setting("PUBLISH_FORCE", "As `--force`.", default=False, form="true or false")
    publish_rebuild: bool = _setting("PUBLISH_REBUILD", "As `--rebuild`.", default=False, form="true or false")
    smoke_test: Literal["auto", "required", "off"] = _setting(
        "SMOKE_TEST",
        "Whether an image is run and queried before its tag moves: `auto` if podman or Docker can run it here, "
        "`required`, or `off`.",
        "auto",
        form="auto, required or off",
    )
    smoke_test_timeout: Annotated[int, Field(gt=0)] = _setting(
        "SMOKE_TEST_TIMEOUT",
        "Seconds after its start within which an image has to answer.",
        180,
        form="a positive number of seconds",
    )
    smoke_test_memory: Annotated[int, Field(gt=0)] | None = _setting(
        "SMOKE_TEST_MEMORY",
        "Memory in MiB that an image may use in its smoke test; if it needs more, the test fails. If this is not set, "
        "an image that needs more than the machine can spare counts as not tested.",
        None,
        shown="three quarters of what is free",
        form="a positive number of MiB",
    )
    smoke_test_candidate: Annotated[Reference, _REFERENCE] | None = _setting(
        "SMOKE_TEST_CANDIDATE",
        "Tag at REGISTRY_URL's host, in a repository of its own, under which a Pod's sidecar pulls the image to be "
        "tested; the component k8s/smoke-test sets it. Used by `fetch`, `candidate` and `push` alone.",
        None,
        shown="none: a Pod tests nothing",
        form="a reference with a tag, such as quay.io/domino/candidates:wheels",
    )
    log_url: str = _setting(
        "LOG_URL",
        "Pattern of the address at which people find a publish's log; it is written to the version's tags when the "
        "publish begins. Its fields, each quoted for a URL: `{model}`, `{version}`, `{target}`, `{pod}`, `{job}`, "
        "`{attempt}` (ATTEMPT_ID) and `{started}` (RFC 3339, in UTC).",
        "",
        shown="no link is written",
        form=f"an address with no other fields than {', '.join(f'{{{name}}}' for name in LOG_FIELDS)}",
    )
    container_variables: dict[str, str] = Field(default_factory=dict)
    # Derived from the environment, not a setting of its own.
    in_pod: bool = False

    @field_validator("log_url")
    @classmethod
    def _log_url_has_known_fields(cls, value: str) -> str:
        if why := _no_pattern(value):
            raise ValueError(why)
        return value

    @field_validator("registry_url")
    @classmethod
    def _images_are_beside_the_cache(cls, value: Repository, info: ValidationInfo) -> Repository:
        _check_apart("BUILD_CACHE", info.data.get("build_cache"), value)
        return value

    @field_validator("wheel_layers")
    @classmethod
    def _wheel_layers_are_beside_images(cls, value: Repository | None, info: ValidationInfo) -> Repository | None:
        images = info.data.get("registry_url")
        if value and not value.path:
            raise ValueError
        if value and images and value.host != images.host:
            message = f"layers can be mounted only within one registry, and images go to {images.host}"
            raise ValueError(message)
        if images:
            _check_apart("WHEEL_LAYERS", value, images)
        return value

    @field_validator("smoke_test_candidate")
    @classmethod
    def _candidates_are_beside_images(cls, value: Reference | None, info: ValidationInfo) -> Reference | None:
        images = info.data.get("registry_url")
        if value and (not value.tag or value.digest):
            raise ValueError
        if value and images and value.repository.host != images.host:
            message = f"layers can be mounted only within one registry, and images go to {images.host}"
            raise ValueError(message)
        if value and images:
            _check_apart("SMOKE_TEST_CANDIDATE", value.repository, images)
            if value.repository == (info.data.get("wheel_layers") or images.child("wheel-layers")):
                message = "it is in the repository of the wheel layers"
                raise ValueError(message)
        return value

    @classmethod
    def _problems(cls, values: Mapping[str, Any]) -> list[str]:
        return [
            *super()._problems(values),
            *_half(values, "REGISTRY_USER", "REGISTRY_TOKEN"),
            *_shared_identity(values),
            *_unreadable("NETRC", values, "file"),
            *_unreadable("WHEEL_COMPILERS", values, "folder"),
            *_no_docker_config(values.get("DOCKER_CONFIG")),
        ]

    @property
    def wheel_layer_repository(self) -> Repository:
        """The repository of the wheel layers."""
        return self.wheel_layers or self.registry_url.child("wheel-layers")

    def component_of(self, model_name: str) -> str:
        """Return the last component of a model's repository, never one of a repository of ours.

        Those are WHEEL_LAYERS, BUILD_CACHE and SMOKE_TEST_CANDIDATE.
        """
        candidates = self.smoke_test_candidate.repository if self.smoke_test_candidate else None
        ours = [repository for repository in (self.wheel_layers, self.build_cache, candidates) if repository]
        names = {repository.path.rpartition("/")[2] for repository in ours}
        reserved = {name for name in names if any(each.holds(self.registry_url.child(name)) for each in ours)}
        return repository_component(model_name, reserved)

    def repository_of(self, model_name: str) -> Repository:
        """Return the repository that a model's images go to."""
        return self.registry_url.child(self.component_of(model_name))


class WebhookSettings(CatalogSettings):
    """Settings of `builder webhook`."""

    webhook_secret: SecretStr | None = _setting(
        "WEBHOOK_SECRET",
        "Secret of MLflow's webhook, at least 16 characters. Several, separated by blanks or line ends, are all "
        "accepted, so that one can follow another; the first is given to MLflow.",
        None,
        shown="no deliveries are taken",
        form="one or more secrets of at least 16 characters each",
    )

    @field_validator("webhook_secret")
    @classmethod
    def _secrets_are_long(cls, value: SecretStr | None) -> SecretStr | None:
        return _long_secrets(value)


class ListenSettings(WebhookSettings, Settings):
    """Settings of `builder listen`."""

    submit_secret: SecretStr | None = _setting(
        "SUBMIT_SECRET",
        "Secret that signs the requests of `builder submit --via`, of `builder hook` and of CI pipelines; several as "
        "in WEBHOOK_SECRET.",
        None,
        shown="no such requests are taken",
        form="one or more secrets of at least 16 characters each",
    )
    status_access: Literal["off", "token", "open"] = _setting(
        "STATUS_ACCESS",
        "Who may see the status page: nobody (`off`), those who have STATUS_TOKEN (`token`), or everybody who reaches "
        "the listener (`open`), such as behind a sign-in of the cluster's.",
        "off",
        form="off, token or open",
    )
    status_token: SecretStr | None = _setting(
        "STATUS_TOKEN",
        "Password of the status page, for any user name, at least 16 characters; several as in WEBHOOK_SECRET.",
        None,
    )
    mlflow_ui_url: str = _setting(
        "MLFLOW_UI_URL",
        "Address of MLflow's pages, to which the status page links.",
        "",
        shown="MLFLOW_TRACKING_URI",
        form="an address such as https://mlflow.example.com",
    )
    listen_host: str = _setting(
        "LISTEN_HOST", "Address that the listener binds to.", "", shown="all, IPv4 and IPv6", form="an IP address"
    )
    listen_port: Annotated[int, Field(ge=0, le=65535)] = _setting(
        "LISTEN_PORT", "Port for deliveries, requests and the status page.", 8080, form="a port"
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = _setting(
        "METRICS_PORT", "Port for metrics and health checks.", 9090, form="a port"
    )
    listen_certificate: Path | None = _setting(
        "LISTEN_CERTIFICATE",
        "PEM file of the certificate, and its chain, with which LISTEN_PORT speaks TLS.",
        None,
        shown="plain HTTP",
    )
    listen_key: Path | None = _setting("LISTEN_KEY", "PEM file of the key of LISTEN_CERTIFICATE.", None)
    listen_parallel: Annotated[int, Field(gt=0)] = _setting(
        "LISTEN_PARALLEL",
        "How many Jobs that a listener has made for deliveries may run at once. Versions that wait are in its memory; "
        "if it ends, the next sweep makes their Jobs.",
        20,
        form="a positive number",
    )
    warm_on_create: bool = _setting(
        "WARM_ON_CREATE",
        "Whether a version that is registered without the target tag gets a Job that makes its wheel layers, so that "
        "they are known when the tag comes; needs the component k8s/warm.",
        default=False,
        form="true or false",
    )
    overview_interval: Annotated[int, Field(gt=0)] = _setting(
        "OVERVIEW_INTERVAL",
        "Seconds after which the listener lists the tagged versions again, for metrics and the status page; longer "
        "where a listing takes long.",
        30,
        form="a positive number of seconds",
    )
    metrics_by_model: bool = _setting(
        "METRICS_BY_MODEL",
        "Whether metrics of versions have the model's name as a label: a time series for each model.",
        default=False,
        form="true or false",
    )

    @field_validator("submit_secret", "status_token")
    @classmethod
    def _other_secrets_are_long(cls, value: SecretStr | None) -> SecretStr | None:
        return _long_secrets(value)

    @field_validator("mlflow_ui_url")
    @classmethod
    def _pages_are_on_the_web(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^\s\"'<>]+", value):
            raise ValueError
        return value.rstrip("/")

    @classmethod
    def _problems(cls, values: Mapping[str, Any]) -> list[str]:
        open_page = values.get("STATUS_ACCESS") == "token" and not values.get("STATUS_TOKEN")
        return [
            *super()._problems(values),
            *_half(values, "LISTEN_CERTIFICATE", "LISTEN_KEY"),
            *_unreadable("LISTEN_CERTIFICATE", values, "file"),
            *_unreadable("LISTEN_KEY", values, "file"),
            *(["STATUS_TOKEN is missing: STATUS_ACCESS is token, and needs it"] if open_page else []),
        ]


def _no_pattern(text: str) -> str:
    """Return why a text is not a pattern of LOG_URL; empty if it is one, or empty."""
    if not text:
        return ""
    try:
        fields = [(name, form, conversion) for _, name, form, conversion in Formatter().parse(text) if name is not None]
    except ValueError:
        return "its braces do not match"
    if unknown := [name for name, form, conversion in fields if name not in LOG_FIELDS or form or conversion]:
        return f"it has the unknown field {{{one_line(unknown[0], 60)}}}"
    if not re.fullmatch(r"https?://[^\s/{\"'<>][^\s\"'<>]*", text):
        return "it is not the address of a web page"
    return (
        "it holds a credential, which everybody who sees the version would see" if _holds_url_credential(text) else ""
    )


def _no_server(uri: str) -> str:
    """Return why an address is not that of an MLflow server; empty if it is valid.

    MLflow reads an address without a scheme as a path: it would make a folder `mlflow.example.com`, and find no model.
    """
    scheme, colon, rest = uri.partition(":")
    if scheme.lower() in {"http", "https"} and colon:
        return "" if rest.startswith("//") and rest[2:].split("/", 1)[0] else "the host is missing"
    path = uri.startswith((".", "/")) and not uri.startswith("//")
    known = uri in {"databricks", "databricks-uc", "uc"} or Path(uri).is_dir()
    schemed = colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9+_-]*", scheme) and (rest.startswith("//") or scheme == "file")
    return "" if path or known or schemed else "the scheme is missing"


def _check_apart(variable: str, ours: Repository | None, images: Repository) -> None:
    """Refuse a repository of ours above the models': credentials for those could write to it."""
    if ours and ours.holds(images):
        message = f"{variable} is {ours}, and REGISTRY_URL is the same or below it"
        raise ValueError(message)


def _is_credential(name: str, value: object) -> bool:
    """Return whether a variable holds a credential that a Dockerfile's RUN step must not read.

    Proxies and package indexes may have a password in their address; RUN steps need those, so they do not count.
    """
    if not isinstance(value, str) or not value or name in INDEX_VARIABLES or name.upper() in PROXY_VARIABLES:
        return False
    named = _CREDENTIAL_VARIABLE.fullmatch(name) and not _PLAIN_VARIABLE.fullmatch(name)
    return bool(named or _holds_url_credential(value))


def _holds_url_credential(value: str) -> bool:
    """Return whether a URL in a value holds a credential."""
    return any(url_credentials(value, quotes=False))


def _mask(values: Mapping[str, Any], home: str, from_files: Collection[str]) -> None:
    """Mask every secret of the settings, and of the credential files that they name or the home folder has.

    Args:
        values: by the variables' names.
        home: the user's home; empty if there is none.
        from_files: names of the variables read from SECRETS_DIR: secrets, except for plain settings.
    """
    kinds = (ListenSettings, HookSettings)
    plain = {field.validation_alias for kind in kinds for field in kind.model_fields.values()}
    for name, value in values.items():
        if not isinstance(value, str) or name in PATH_VARIABLES:
            continue
        # curl takes a proxy without a scheme.
        url = value if "://" in value or name not in PROXY_VARIABLES else f"http://{value}"
        mask_secrets(in_urls(url, quotes=False))
        secret = _CREDENTIAL_VARIABLE.fullmatch(name) and not _PLAIN_VARIABLE.fullmatch(name)
        setting = name in plain or name in INDEX_VARIABLES or bool(_MLFLOW_VARIABLE.fullmatch(name))
        if secret or name == "DOMINO_RUN_ID" or (name in from_files and not setting):
            mask([value], user=str(values.get(_USERS.get(name, ""), "")))
            mask_secrets(in_connection_string(value) if ";" in value else in_text(value) if "{" in value else iter(()))
    mask_files(values, home)


def several(value: SecretStr | None) -> list[str]:
    """Return the secrets of a setting that may have several, separated by blanks or line ends."""
    return value.get_secret_value().split() if value else []


def _long_secrets(value: SecretStr | None) -> SecretStr | None:
    """Return a text of one or more secrets, all of which are masked from now on.

    Raises:
        ValueError: one is too short.
    """
    parts = several(value)
    if value and (not parts or min(map(len, parts)) < _SHORTEST_SECRET):
        message = f"shorter than {_SHORTEST_SECRET} characters"
        raise ValueError(message)
    mask(parts)
    return value


def _unreadable(variable: str, values: Mapping[str, Any], kind: Literal["file", "folder"]) -> list[str]:
    there = Path.is_file if kind == "file" else Path.is_dir
    path = values.get(variable)
    if not path or (there(Path(path)) and os.access(path, os.R_OK)):
        return []
    return [f"{variable} is {str(path)!r}, which is not a readable {kind}"]


def _no_docker_config(folder: str | Path | None) -> list[str]:
    """Return a problem if DOCKER_CONFIG is not a folder with a config.json, and what is there instead."""
    if not folder or Path(folder) == _IN_IMAGE_DOCKER_CONFIG or (Path(folder) / "config.json").exists():
        return []
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        return [f"DOCKER_CONFIG is {str(path)!r}, which {what}: it has to be a folder with a config.json"]
    try:
        names = sorted(entry.name for entry in islice(path.iterdir(), _MOST_NAMES))
    except OSError as error:
        return [f"DOCKER_CONFIG is {str(path)!r}, which cannot be read: {error.strerror}"]
    there = f"it contains {', '.join(repr(one_line(name, 60)) for name in names)}" if names else "it is empty"
    hint = "; mount the secret's key .dockerconfigjson as config.json" if ".dockerconfigjson" in names else ""
    return [f"DOCKER_CONFIG is the folder {str(path)!r}, which has no config.json: {there}{hint}"]


def _shared_identity(values: Mapping[str, Any]) -> list[str]:
    """Return a problem if an image that is tested would be in reach of the publisher's own identity."""
    if not (values.get("GCE_METADATA_HOST") and values.get("SMOKE_TEST_CANDIDATE")):
        return []
    why = "the image that is tested would be served the publisher's token, as every container of the Pod is"
    return [f"GCE_METADATA_HOST and SMOKE_TEST_CANDIDATE are both set: {why}"]


def _half(values: Mapping[str, Any], *names: str) -> list[str]:
    """Return a problem for each of a pair that is missing while the other is set."""
    missing = [name for name in names if not values.get(name)]
    if not missing or len(missing) == len(names):
        return []
    there = next(name for name in names if name not in missing)
    return [f"{missing[0]} is missing: {there} is set, and needs it"]


def _secrets(folder: str) -> dict[str, str]:
    """Return the contents of SECRETS_DIR's files by name, one trailing newline removed."""
    if not folder:
        return {}
    try:
        files = [path for path in Path(folder).iterdir() if _SECRET_NAME.fullmatch(path.name) and path.is_file()]
        return {
            path.name: text
            for path in files
            if path.stat().st_size <= _MOST_SECRET_BYTES and (text := path.read_text().removesuffix("\n"))
        }
    except (OSError, UnicodeDecodeError) as error:
        message = f"SECRETS_DIR is {folder!r}, which cannot be read: {type(error).__name__}."
        raise InvalidSettings(message, remedy="Name a folder of text files, each named after a variable.") from error


def _problem(cls: type[BaseModel], detail: Any) -> str:  # pydantic's ErrorDetails
    """Return one sentence on a setting that pydantic refused; it never shows the value, which may be a secret."""
    variable = str(detail["loc"][0])
    field = next((f for f in cls.model_fields.values() if f.validation_alias == variable), None)
    extra = field.json_schema_extra if field and isinstance(field.json_schema_extra, dict) else {}
    form = extra.get("form") or (field.description if field else "")
    if detail["type"] == "missing":
        return f"{variable} is missing: {form}"
    cause = detail.get("ctx", {}).get("error")
    why = f" ({cause})" if isinstance(cause, ValueError) and str(cause) else ""
    return f"{variable} is malformed{why}: it should be {form}"


def network(settings: BuildSettings) -> Network:
    """Return the way to the network for pulls, RUN steps and package indexes; only `Settings` have a netrc file."""
    return Network(
        ca_bundle=settings.ssl_cert_file,
        pip_config=settings.pip_config_file,
        proxies=settings.proxies,
        index_variables={name: value.get_secret_value() for name, value in settings.index_variables.items()},
        insecure_registries=settings.insecure_registries,
        netrc=settings.netrc if isinstance(settings, Settings) else None,
    )


class ListenerAddress(CommonSettings):
    """Where the listener is, for those who ask it."""

    listener_url: str = _setting(
        "LISTENER_URL",
        "Address of the listener (`builder listen`) that makes Jobs on request.",
        "",
        form="an address such as https://builder.example.com, without a user, a query or a fragment",
    )

    @field_validator("listener_url")
    @classmethod
    def _listener_is_on_the_web(cls, value: str) -> str:
        return _web_address(value)


class DoctorSettings(ListenerAddress, ListenSettings):
    """Settings of `builder doctor`: those of all commands that run in a cluster, and where the listener is."""

    @classmethod
    def _problems(cls, values: Mapping[str, Any]) -> list[str]:
        # A Job, or a laptop, has neither STATUS_TOKEN nor the listener's certificate: only a listener needs them.
        return super(ListenSettings, cls)._problems(values)


class RemoteSettings(ListenerAddress):
    """Settings of a client of the listener: it needs neither MLflow nor a registry."""

    submit_secret: SecretStr | None = _setting(
        "SUBMIT_SECRET",
        "Secret that signs requests to the listener: the first of those in its own SUBMIT_SECRET.",
        None,
        form="a secret of at least 16 characters",
    )
    model_name: str = _setting("MODEL_NAME", "The registered model to publish.", "")
    model_version: str = _setting("MODEL_VERSION", "Its version: a number, or an alias as `@champion`.", "")

    @field_validator("submit_secret")
    @classmethod
    def _one_secret_signs(cls, value: SecretStr | None) -> SecretStr | None:
        parts = several(value)
        mask(parts)
        return SecretStr(parts[0]) if parts else None


class HookSettings(RemoteSettings):
    """Settings of `builder hook` and `builder domino`; Domino sets most of them in each run."""

    kube_namespace: str = _setting(
        "KUBE_NAMESPACE",
        "Namespace of the Jobs that `builder hook` makes by the Kubernetes API; `--namespace` overrides it.",
        "",
        shown="the account's or the context's own, or else builder",
    )
    domino_run_id: SecretStr | None = _setting("DOMINO_RUN_ID", "The Domino run that this process is in.", None)
    mlflow_run_id: str = _setting(
        "MLFLOW_RUN_ID", "The MLflow run whose newest selected version `builder hook` publishes.", ""
    )
    domino_working_dir: Path | None = _setting(
        "DOMINO_WORKING_DIR",
        "The project's root in a Domino run, where `builder hook` writes dominostats.json.",
        None,
        shown="nothing is written",
    )
    domino_api_host: str = _setting(
        "DOMINO_API_HOST",
        "Domino's address; in a run an internal one, elsewhere the one that people open in a browser.",
        "",
        form="an address such as https://domino.example.com",
    )
    domino_api_proxy: str = _setting(
        "DOMINO_API_PROXY",
        "The proxy in a Domino run that adds the identity to requests, and gives tokens at `/access-token`.",
        "",
        form="an address such as http://localhost:8899",
    )
    domino_token: SecretStr | None = _setting(
        "DOMINO_TOKEN", "Outside a run: a Personal Access Token, or a service account's token.", None
    )
    domino_token_file: Path | None = _setting(
        "DOMINO_TOKEN_FILE", "Outside a run: a file with such a token, read anew for each request.", None
    )
    domino_user_api_key: SecretStr | None = _setting(
        "DOMINO_USER_API_KEY", "A legacy API key of Domino's, sent where there is no token.", None
    )
    domino_project_id: str = _setting("DOMINO_PROJECT_ID", "The project that a job is started in.", "")
    domino_project_name: str = _setting("DOMINO_PROJECT_NAME", "The project's name, for the log.", "")
    domino_project_owner: str = _setting("DOMINO_PROJECT_OWNER", "The project's owner, for the log.", "")
    domino_starting_username: str = _setting("DOMINO_STARTING_USERNAME", "Who started the run, for the log.", "")

    @field_validator("domino_api_host", "domino_api_proxy")
    @classmethod
    def _domino_is_on_the_web(cls, value: str) -> str:
        # Domino's own clients take the proxy without a scheme.
        return _web_address(value if "://" in value or not value else f"http://{value}")

    @classmethod
    def _problems(cls, values: Mapping[str, Any]) -> list[str]:
        return [*super()._problems(values), *_unreadable("DOMINO_TOKEN_FILE", values, "file")]


def _web_address(value: str) -> str:
    """Return the address of a web server without its last slash; empty if it is."""
    if value and not re.fullmatch(r"https?://[^\s\"'<>@?#]+", value):
        raise ValueError
    return value.rstrip("/")

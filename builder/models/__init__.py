"""A registered model's version, what its tags ask for, and its catalog. Only this package imports mlflow."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import unicodedata
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict, Field

from builder.errors import InvalidVersion, VersionNotFound
from builder.masking import one_line
from builder.reference import Platform, parse_platforms
from builder.safe_open import SAFE_PATH, path_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path


# Raised when the same inputs would give another image: a version published before is then another source.
LAYOUT_VERSION = 1

TAG_MODEL_FOLDER = "MODEL_FOLDER"
TAG_CLIENT_FOLDER = "MODEL_CLIENT_FOLDER"
TAG_TEMPLATES_FOLDER = "MODEL_TEMPLATES_FOLDER"
TAG_ENTRY_POINT = "MODEL_ENTRY_POINT"
TAG_EXECUTE_PATH = "MODEL_EXECUTE_PATH"
TAG_PLATFORMS = "MODEL_PLATFORMS"
TAG_BASE_IMAGE = "MODEL_BASE_IMAGE"
TAG_DOCKERFILE = "MODEL_DOCKERFILE"
INPUT_TAGS = (
    TAG_MODEL_FOLDER,
    TAG_CLIENT_FOLDER,
    TAG_TEMPLATES_FOLDER,
    TAG_ENTRY_POINT,
    TAG_EXECUTE_PATH,
    TAG_BASE_IMAGE,
    TAG_DOCKERFILE,
    TAG_PLATFORMS,
)

DEFAULT_CLIENT_FOLDER = "client"
DEFAULT_TEMPLATES_FOLDER = "templates"

# A folder of a version that has a Dockerfile; without one, any folder will do that no program takes for an option.
FOLDER = SAFE_PATH
_HIDDEN_OR_OPTION = re.compile(r"(?:^|/)[.-]")
# A command line may hold blanks, '=' and ',' beside that.
_COMMAND_LINE = re.compile(r"[A-Za-z0-9_./@%+=:, -]*")
# MLflow takes tags of 100,000 characters. A path of a file has at most 4,096, a reference fewer.
_LONGEST_TAG = 4096
_VERSION = re.compile(r"[0-9]{1,10}")
_ALIAS = re.compile(r"@[^\s/:@]{1,255}")


def selects(value: str) -> bool:
    """Return whether a target's tag with this value selects a version: `true`, in any case."""
    return value.strip().lower() == "true"


class ModelVersion(BaseModel):
    """One version of a registered model, as MLflow's search for versions returns it.

    Attributes:
        name: the registered model's name, any string MLflow allows.
        version: the version's number, decimal digits.
        created_ms: when it was registered, in milliseconds since the epoch.
        source: the URI its artifacts were registered from: `runs:/…`, `models:/m-…` or an artifact store's own.
        run_id: the run that logged it; empty where there is none.
        model_id: the logged model (MLflow 3) it was registered from; empty where there is none.
        tags: the version's tags.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    created_ms: int
    source: str = ""
    run_id: str = ""
    model_id: str = ""
    tags: dict[str, str] = Field(default_factory=dict)

    def __str__(self) -> str:
        """Return `name version N`, with the name quoted where it holds anything unusual."""
        return f"model {self.name!r} version {self.version}"

    @property
    def created(self) -> datetime:
        """When the version was registered, in UTC."""
        return datetime.fromtimestamp(self.created_ms / 1000, tz=UTC)

    def untagged(self) -> ModelVersion:
        """Return the version without its tags, which are most of it."""
        return self.model_copy(update={"tags": {}})

    def selected_by(self, target_tag: str) -> bool:
        """Return whether the version carries the target's tag with the value `true`, in any case."""
        return selects(self.tags.get(target_tag, ""))

    def source_id(self) -> str:
        """Return the hash of all that decides whether this version's image has to be made again.

        It is made from what MLflow's search for versions returns alone, so that a sweep needs no further request. The
        platforms are not part of it: a platform that is added extends an index, and changes no image in it. Nor is what
        an operator sets, such as BUILD_METHOD: what the author gives decides.

        Returns:
            64 hexadecimal digits.
        """
        inputs = {name: self.tags[name] for name in INPUT_TAGS if name in self.tags and name != TAG_PLATFORMS}
        what = [
            LAYOUT_VERSION,
            self.name,
            self.version,
            self.created_ms,
            self.source,
            self.run_id,
            sorted(inputs.items()),
        ]
        return hashlib.sha256(json.dumps(what, ensure_ascii=True).encode()).hexdigest()


class Inputs(BaseModel):
    """What a version's tags ask for, checked. Tags that are not set are empty strings.

    Attributes:
        source: the version's, which names the folder that was registered.
        no_dockerfile: the version has no Dockerfile, whatever its files are called.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = ""
    model_folder: str = ""
    client_folder: str = DEFAULT_CLIENT_FOLDER
    templates_folder: str = DEFAULT_TEMPLATES_FOLDER
    entry_point: str = ""
    command_line: str = ""
    base_image: str = ""
    no_dockerfile: bool = False

    @classmethod
    def of(cls, version: ModelVersion) -> Inputs:
        """Return the inputs that the version's tags name.

        Raises:
            InvalidVersion: tags hold what is not allowed in a path, a Dockerfile or a script; all are named.
        """
        problems: list[str] = []

        def checked(tag: str, accepts: Callable[[str], object], hint: str, default: str = "") -> str:
            value = version.tags.get(tag, "").strip()
            if not value:
                return default
            if tag != TAG_EXECUTE_PATH:
                value = value.strip("/") if tag != TAG_ENTRY_POINT else value
            if len(value) > _LONGEST_TAG:
                problems.append(f"{tag} has {len(value):,} characters, but {_LONGEST_TAG:,} are the most")
            elif not accepts(value) or ".." in value.split("/"):
                problems.append(f"{tag} is {value[:100]!r}, but {hint}")
            return unicodedata.normalize("NFC", value)

        folder_hint = "a folder is a relative path of letters, digits and '_', '.', '@', '+', '-'"
        entry_point = re.compile(rf"/?{SAFE_PATH.pattern}")
        any_hint = "a folder is a relative path without '.', '..', backslashes and control characters"
        inputs = cls(
            source=version.source,
            model_folder=checked(TAG_MODEL_FOLDER, _is_any_folder, any_hint),
            client_folder=checked(TAG_CLIENT_FOLDER, _is_any_folder, any_hint, DEFAULT_CLIENT_FOLDER),
            templates_folder=checked(TAG_TEMPLATES_FOLDER, SAFE_PATH.fullmatch, folder_hint, DEFAULT_TEMPLATES_FOLDER),
            entry_point=checked(
                TAG_ENTRY_POINT,
                entry_point.fullmatch,
                "an entry point is a path of letters, digits and '_', '.', '@', '+', '-'",
            ),
            command_line=checked(
                TAG_EXECUTE_PATH,
                _COMMAND_LINE.fullmatch,
                "a command line has only letters, digits, blanks and '_', '.', '/', '@', '%', '+', '=', ':', ',', '-'",
            ),
            base_image=checked(
                TAG_BASE_IMAGE, re.compile(r"[A-Za-z0-9._/:@-]+").fullmatch, "an image reference has no such characters"
            ),
            no_dockerfile=bool(
                checked(
                    TAG_DOCKERFILE,
                    re.compile("none", re.IGNORECASE).fullmatch,
                    "'none' is its only value: no Dockerfile is run",
                )
            ),
        )
        if problems:
            message = f"{version} has tags that cannot be used: {'; '.join(problems)}."
            raise InvalidVersion(message, remedy="Set the tags again.")
        return inputs


def _is_any_folder(path: str) -> bool:
    return not path_problem(path) and not _HIDDEN_OR_OPTION.search(path)


def wanted_platforms(version: ModelVersion, default: tuple[Platform, ...]) -> tuple[Platform, ...]:
    """Return the platforms of the version's MODEL_PLATFORMS tag, or `default` where it has none.

    Raises:
        InvalidVersion: the tag names something that is not a platform.
    """
    text = version.tags.get(TAG_PLATFORMS, "").strip()
    if not text:
        return default
    try:
        return parse_platforms(text)
    except InvalidVersion as error:
        message = f"{version} has a tag {TAG_PLATFORMS} that cannot be used: {error.what}"
        raise InvalidVersion(message, remedy=error.remedy) from error


def check_version_text(version: str) -> str:
    """Return `version` if it is a version's number or an alias with its `@`.

    Raises:
        VersionNotFound: it is neither, so no version can have it.
    """
    if not (_VERSION.fullmatch(version) or _ALIAS.fullmatch(version)):
        message = f"{version[:100]!r} is not a model version."
        raise VersionNotFound(message, remedy="Give a number, such as 8, or an alias, such as @champion.")
    return version


def template_variables(version: ModelVersion, inputs: Inputs, repository: str) -> dict[str, str]:
    """Return the values that templates may name; each is safe in a Dockerfile and in a shell word.

    A model's name can be any string, so `model_name` is the repository component made from it, which is also what an
    image of that name needs.

    Args:
        version: the model version.
        inputs: its checked tags, the model folder filled in.
        repository: the repository component of the model's name.
    """
    return {
        "model_name": repository,
        "model_version": version.version,
        "model_download_folder": ".",
        "model_folder": inputs.model_folder,
        "model_client_folder": inputs.client_folder,
        "entry_point": inputs.entry_point,
        "command_line": inputs.command_line,
    }


def natural_order(versions: Iterable[ModelVersion]) -> list[ModelVersion]:
    """Return versions ordered by model name, then by number."""
    # As text, since Python refuses to read a number of thousands of digits.
    return sorted(versions, key=lambda version: (version.name, len(version.version), version.version))


class Artifact(BaseModel):
    """One file of a model version.

    Attributes:
        path: its place in the context, relative, with forward slashes, normalised and checked.
        size: bytes, as the artifact store tells; None where it does not.
        root: URI of the artifact folder it is in (the run's, or the logged model's).
        remote: its path below `root`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int | None
    root: str
    remote: str


class Catalog(Protocol):
    """Find, list, read and tag model versions. `MlflowCatalog` is the one on a server."""

    def find(self, name: str, version: str) -> ModelVersion:
        """Return one version, by number or by alias as `@alias`.

        Raises:
            VersionNotFound: there is no such model, version or alias.
            ServiceUnavailable: MLflow is away or answers with what it should not.
            PermissionRefused: MLflow refuses the credential.
        """
        ...

    def tagged(self, tag: str) -> Iterator[ModelVersion]:
        """Yield every version that carries `tag` with the value `true` in any case, page by page."""
        ...

    def artifacts(self, version: ModelVersion) -> tuple[Artifact, ...]:
        """Return the files of the version's context, ordered by path: the run's, and the logged model's below the
        model folder.

        Raises:
            InvalidVersion: a path is absolute, leaves the context, or collides with another one; or there is no file.
        """
        ...

    def download(self, artifact: Artifact, destination: Path) -> None:
        """Write one artifact's bytes to the file `destination`, whose folder exists."""
        ...

    def set_tags(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags on the version; others stay as they are."""
        ...


# With such a value, the tag was meant not to select the version.
_NO = frozenset({"", "false", "no", "off", "0", "none"})
_LIKE = 0.85
# Tags are others' text: so many different names are compared, and so many findings shown.
_MOST_NAMES = 2000
_MOST_SHOWN = 10
_LONGEST = 100


class NearMisses:
    """Collects what is like a target tag.

    Attributes:
        versions: how many versions were seen.

    Args:
        tag: the target tag.
    """

    def __init__(self, tag: str) -> None:
        self.versions = 0
        self._tag = tag
        self._like: dict[str, bool] = {tag: True}
        self._on_versions: dict[tuple[str, str], tuple[int, str]] = {}
        self._on_models: list[str] = []

    def add(self, version: ModelVersion) -> None:
        """Take a version."""
        self.versions += 1
        for shown in self._near(version.tags):
            count, first = self._on_versions.get(shown, (0, str(version)))
            self._on_versions[shown] = (count + 1, first)

    def add_model(self, name: str, tags: Mapping[str, str]) -> None:
        """Take a registered model and its own tags."""
        for tag, value in self._near(tags):
            self._on_models.append(
                f"{tag}={value!r} on the registered model {one_line(name, _LONGEST)!r}, not a version"
            )

    def findings(self) -> list[str]:
        """Return a text for each finding, the most frequent first."""
        most = sorted(self._on_versions.items(), key=lambda item: -item[1][0])
        found = [
            f"{tag}={value!r} on {count} version{'s' if count > 1 else ''}, such as {first}"
            for (tag, value), (count, first) in most
        ]
        return [*found, *self._on_models][:_MOST_SHOWN]

    def _near(self, tags: Mapping[str, str]) -> list[tuple[str, str]]:
        return [
            (one_line(tag, _LONGEST), one_line(value, _LONGEST))
            for tag, value in tags.items()
            if value.strip().lower() not in _NO and self._is_like(tag)
        ]

    def _is_like(self, tag: str) -> bool:
        if tag not in self._like:
            if len(self._like) > _MOST_NAMES or abs(len(tag) - len(self._tag)) > len(self._tag):
                return False
            match = difflib.SequenceMatcher(None, tag.strip().lower(), self._tag.lower(), autojunk=False)
            self._like[tag] = match.quick_ratio() >= _LIKE and match.ratio() >= _LIKE
        return self._like[tag]

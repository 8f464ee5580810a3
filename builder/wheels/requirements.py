"""The requirements of a model, from the files of its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Self

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from builder.errors import InvalidVersion
from builder.masking import one_line
from builder.model_folder import CONDA, PYTHON_ENV, REQUIREMENTS, Environment, read_description, requirements_text
from builder.package_index import Indexes
from builder.safe_open import SAFE_PATH, Yaml, digest_beneath, read_beneath
from builder.wheels.pip_syntax import (
    NAME,
    Required,
    Unusable,
    checked_url,
    is_pypi,
    logical_lines,
    parse_line,
    refuse_line,
)

_ENTRY = re.compile(r"(?:[^\s:]{1,200}::)?([A-Za-z0-9_][A-Za-z0-9_.-]{0,199})[ \t]{0,9}([^\s\[\]]{0,200})")
_VERSION = r"[0-9]{1,9}(?:\.[0-9A-Za-z]{1,20}){0,9}"
# `=1.2` is any 1.2; with a build behind it, or with `==`, it is that version alone.
_FUZZY = re.compile(rf"=?({_VERSION})(?:\.?\*)?")
_EXACT = re.compile(rf"(?:==({_VERSION})|=?({_VERSION})=[A-Za-z0-9_.]{{1,100}})")
# Packages that have another name where pip looks; the others have the same.
_NAMES = {
    "matplotlib-base": "matplotlib",
    "msgpack-python": "msgpack",
    "opencv": "opencv-python-headless",
    "py-opencv": "opencv-python-headless",
    "py-xgboost": "xgboost",
    "pytables": "tables",
    "python-graphviz": "graphviz",
    "pytorch": "torch",
    "pytorch-cpu": "torch",
    "tensorflow-base": "tensorflow",
}
_MOST_NAMED = 10
_REMEDY = (
    "Install it in a Dockerfile.template of the version's own, whose base image or RUN steps bring it, or name its "
    "wheel in requirements.txt and take it out of conda.yaml."
)


def conda_refused(names: Sequence[str]) -> InvalidVersion:
    """Return the error for packages that only conda could bring.

    Args:
        names: theirs, fit to be shown.
    """
    rest = len(names) - _MOST_NAMED
    what = ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
    message = f"conda.yaml requires {what}, of which no package index has a wheel. conda is not run here."
    return InvalidVersion(message, remedy=_REMEDY)


def conda_package(entry: str) -> Required | None:
    """Return the requirement for an entry of conda.yaml; None where the entry has no such form.

    Args:
        entry: `numpy`, `numpy=1.21`, `numpy=1.21.2=py38h1234_0`, `conda-forge::numpy>=1.21,<2`.
    """
    found = _ENTRY.fullmatch(entry.strip())
    name = canonicalize_name(found[1]) if found else ""
    if found is None or not NAME.fullmatch(name):
        return None
    wanted = found[2]
    if exact := _EXACT.fullmatch(wanted):
        wanted = f"=={exact[1] or exact[2]}"
    elif fuzzy := _FUZZY.fullmatch(wanted):
        wanted = f"=={fuzzy[1]}.*"
    try:
        specifier = str(SpecifierSet(wanted))
    except InvalidSpecifier:
        return None
    return Required(name=_NAMES.get(name, name), specifier=specifier)


_LIMIT = 1 << 20
# Of one model, all files together; a large environment has some hundred requirements.
_MOST_FILES, _MOST_BYTES, _MOST_TEXT_LINES, _MOST_LINES = 20, 1 << 20, 50_000, 5_000
_MOST_PROBLEMS = 10
# The most characters of an author's text that are considered for a message.
_MOST_SHOWN = 1000
_CONDA_NAME = re.compile(r"(?:[^\s:]+::)?([A-Za-z0-9_][A-Za-z0-9_.-]*)")
_REQUIREMENTS_FILE = re.compile(r"(?:-r|--requirement)[ =]?(?:\./)?requirements\.txt")
# Each that the lock lacks is looked up in the indexes.
_MOST_CONDA = 500
_CONDA_KNOWN = frozenset({"python", "pip"})
_CORRECT = "Correct the model's requirements and register it again, or ship a Dockerfile.template that installs them."


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalWheel:
    """A wheel that lies in the model folder.

    Attributes:
        path: from the model folder.
        sha256: of its content, 64 hexadecimal digits.
        size: in bytes.
    """

    path: str
    sha256: str
    size: int

    @property
    def filename(self) -> str:
        """The wheel's file name."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What is to be installed; two with the same `to_text` are the same environment.

    Attributes:
        python_version: the model's, major and minor: `3.11`; empty where it is not known.
        mlflow_version: the release of MLflow that logged the model; empty where it is not known.
        logged: when the model was logged, in UTC; None where it is not known.
        required: the requirements, in order, each once.
        constraints: bounds for what is installed anyway.
        conda: what conda.yaml asks of conda, to be added where the lock lacks the package.
        local: wheels of the model folder that `required` names.
        indexes: addresses of package indexes that the model names beside the configured ones.
        prereleases: whether pre-releases are taken.
        require_hashes: whether every package has to be of a hash that `required` names.
        serves: whether MLflow's scoring server runs in the environment.
        build: packages in `required` that the environment was built with, and that give way to what needs others.
        added: packages in `required` that the model does not name.
        uses: packages to be added as `otherwise` has them, where that does and the lock of these does not.
        otherwise: what is installed where these cannot be; None for nothing.
    """

    python_version: str = ""
    mlflow_version: str = ""
    logged: datetime | None = None
    required: tuple[Required, ...] = ()
    constraints: tuple[Required, ...] = ()
    conda: tuple[Required, ...] = ()
    local: tuple[LocalWheel, ...] = ()
    indexes: tuple[str, ...] = ()
    prereleases: bool = False
    require_hashes: bool = False
    serves: bool = False
    build: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    otherwise: Requirements | None = field(default=None, compare=False, repr=False)

    @classmethod
    def read(
        cls, context: Path, model_folder: str, indexes: Indexes | None = None, *, client_folder: str = ""
    ) -> Self:  # fmt: skip
        """Return the requirements of the model in `context / model_folder`.

        They are those of requirements.txt; where there is none, those of python_env.yaml; where that names none, those
        of conda.yaml's pip section. python_env.yaml's build dependencies come beside them, unless they name the same
        package.

        Args:
            context: folder of the version's artifacts.
            model_folder: the model's folder in it.
            indexes: which addresses a model may name; None for none.
            client_folder: a folder whose requirements.txt counts as well, where it has one; empty for none.

        Raises:
            InvalidVersion: a file is malformed, a link or too large, or asks for what cannot be had: every line that
                does is named.
        """
        reader = _Reader(context, model_folder, indexes or Indexes())
        python_env = reader.yaml(PYTHON_ENV)
        conda = reader.yaml(CONDA)
        conda_pip = reader.conda(conda)
        if read_beneath(context, f"{model_folder}/{REQUIREMENTS}", _LIMIT) is not None:
            reader.file(REQUIREMENTS)
        elif lines := reader.dependencies(python_env):
            reader.lines("\n".join(lines), PYTHON_ENV)
        else:
            reader.lines("\n".join(conda_pip), CONDA)
        if client_folder and read_beneath(context, f"{client_folder}/{REQUIREMENTS}", _LIMIT) is not None:
            reader.client(client_folder)
        build = reader.build(python_env)
        reader.refuse()
        environment = Environment.read(context, model_folder)
        return cls(
            python_version=environment.python_version,
            mlflow_version=environment.mlflow_version,
            logged=environment.logged,
            required=_ordered([*reader.required, *build]),
            constraints=_ordered(reader.constraints),
            build=frozenset(one.name for one in build),
            conda=_ordered(reader.conda_packages),
            local=tuple(reader.local[path] for path in sorted(reader.local)),
            indexes=tuple(dict.fromkeys(reader.indexes)),
            prereleases=reader.prereleases,
            require_hashes=reader.require_hashes,
        )

    @classmethod
    def of(cls, *lines: str, python_version: str = "", mlflow_version: str = "") -> Self:
        """Return the requirements that lines in pip's form write; they name no file and no index.

        Raises:
            InvalidVersion: a line cannot be used.
        """
        reader = _Reader(None, "", Indexes())
        reader.lines("\n".join(lines), "the requirements")
        reader.refuse()
        return cls(
            python_version=python_version,
            mlflow_version=mlflow_version,
            required=_ordered(reader.required),
            prereleases=reader.prereleases,
            require_hashes=reader.require_hashes,
        )

    def named(self, name: str) -> tuple[Required, ...]:
        """Return the requirements on a package, by its normal name."""
        return tuple(required for required in self.required if required.name == name)

    def with_changes(self, *, required: tuple[Required, ...], constraints: tuple[Required, ...] = ()) -> Self:
        """Return the same with other requirements, and with constraints beside those that are there."""
        return replace(self, required=_ordered(required), constraints=_ordered([*self.constraints, *constraints]))

    def without_build(self) -> Self:
        """Return the same without the packages that the environment was built with."""
        required = tuple(one for one in self.required if one.name not in self.build)
        return replace(self, required=required, build=frozenset())

    def to_text(self) -> str:
        """Return the canonical text, whose hash can stand for the environment.

        A wheel of the model folder is in it by name and content, not by place. Python's version is not part of it.
        """
        digests = {wheel.path: f"{wheel.filename}#sha256={wheel.sha256}" for wheel in self.local}
        lines = [f"--extra-index-url {url}" for url in self.indexes]
        lines += ["--pre"] if self.prereleases else []
        lines += ["--require-hashes"] if self.require_hashes else []
        lines += sorted(f"--constraint {_line(required, digests)}" for required in self.constraints)
        lines += [f"--uses {name}" for name in sorted(self.uses)]
        lines += sorted(f"--conda {_line(required, digests)}" for required in self.conda)
        lines += sorted(_line(required, digests) for required in self.required)
        return "".join(f"{line}\n" for line in lines)


def _shown(what: object, limit: int) -> str:
    """Return an author's text for a message; of a long one only the beginning, up to the first address."""
    text = what if isinstance(what, str) else f"a value of the type {type(what).__name__}"
    return one_line(text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN].partition("://")[0], limit)


def _line(required: Required, digests: dict[str, str]) -> str:
    hashes = "".join(f" --hash=sha256:{digest}" for digest in required.hashes)
    return f"{required.text(digests.get(required.path, ''))}{hashes}"


def _ordered(required: list[Required] | tuple[Required, ...]) -> tuple[Required, ...]:
    return tuple(sorted(dict.fromkeys(required), key=lambda one: (one.name, one.text(one.path), one.hashes)))


class _Reader:
    """Reads requirement files of one model, and collects what is wrong with them."""

    def __init__(self, context: Path | None, model_folder: str, indexes: Indexes) -> None:
        self._context, self._folder, self._indexes = context, model_folder, indexes
        self._read: dict[tuple[str, bool], None] = {}
        self._problems: list[str] = []
        self._count = self._bytes = self._text_lines = self._lines = 0
        self.required: list[Required] = []
        self.constraints: list[Required] = []
        self.conda_packages: list[Required] = []
        self.local: dict[str, LocalWheel] = {}
        self.indexes: list[str] = []
        self.prereleases = False
        self.require_hashes = False

    def refuse(self) -> None:
        """Raise InvalidVersion if there were problems."""
        if self._problems:
            rest = self._count - _MOST_PROBLEMS
            shown = "; ".join(self._problems) + (f"; and {rest} more" if rest > 0 else "")
            message = f"The model's requirements cannot be installed: {shown}."
            raise InvalidVersion(message, remedy=_CORRECT)

    def _problem(self, what: str) -> None:
        self._count += 1
        if self._count <= _MOST_PROBLEMS:
            self._problems.append(what)

    def yaml(self, name: str) -> dict[str, Yaml]:
        """Return a YAML file's mapping; empty where there is no file."""
        assert self._context is not None  # noqa: S101  # only `read` asks
        return read_description(self._context, self._folder, name)

    def strings(self, table: dict[str, Yaml], key: str, name: str) -> list[str]:
        """Return the list of strings under a key of a YAML file, each on one line; empty where there is none.

        Args:
            table: what has the key.
            key: the list's.
            name: the file's.
        """
        value = table.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self._problem(f"`{key}` in {name} is not a list")
            return []
        for entry in value:
            if not isinstance(entry, str) or "\n" in entry:
                self._problem(f"`{key}` in {name} has an entry that is not one line of text: {_shown(entry, 80)}")
        return [entry for entry in value if isinstance(entry, str) and "\n" not in entry]

    def dependencies(self, python_env: dict[str, Yaml]) -> list[str]:
        """Return python_env.yaml's dependencies, less the requirements.txt that MLflow names there."""
        lines = self.strings(python_env, "dependencies", PYTHON_ENV)
        return [line for line in lines if not _REQUIREMENTS_FILE.fullmatch(line.strip())]

    def build(self, python_env: dict[str, Yaml]) -> list[Required]:
        """Return python_env.yaml's build dependencies, less the packages that the requirements name themselves."""
        named = {one.name for one in self.required}
        others, self.required = self.required, []
        lines = self.strings(python_env, "build_dependencies", PYTHON_ENV)
        self.lines("\n".join(lines), f"{PYTHON_ENV}, build_dependencies")
        build, self.required = self.required, others
        return [one for one in build if one.name not in named]

    def conda(self, document: dict[str, Yaml]) -> list[str]:
        """Return conda.yaml's pip section.

        Raises:
            InvalidVersion: conda itself is to install what is not a package's name and version, or too many packages.
        """
        entries = document.get("dependencies")
        pip: list[str] = []
        others: list[str] = []
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and set(entry) == {"pip"}:
                pip += self.strings(entry, "pip", CONDA)
                continue
            name = _CONDA_NAME.match(entry) if isinstance(entry, str) else None
            if name and name[1].lower() in _CONDA_KNOWN:
                continue
            if isinstance(entry, str) and (package := conda_package(entry)):
                self.conda_packages.append(package)
            else:
                others.append(_shown(name[1] if name else entry, 60))
        if others or len(self.conda_packages) > _MOST_CONDA:
            raise conda_refused(others or [one.name for one in self.conda_packages])
        return pip

    def file(self, path: str, *, constraints: bool = False) -> None:
        """Read a requirements file of the model folder."""
        key = (f"{self._folder}/{path}", constraints)
        if key in self._read:
            return
        self._read[key] = None
        if len(self._read) > _MOST_FILES:
            refuse_line(f"more than {_MOST_FILES} requirement files include each other")
        content = read_beneath(self._context, f"{self._folder}/{path}", _MOST_BYTES) if self._context else None
        if content is None:
            refuse_line(f"there is no file {path!r} in the model folder")
        try:
            text = requirements_text(content)
        except UnicodeDecodeError:
            self._problem(f"{self._folder}/{path} is not UTF-8")
            return
        self.lines(text, path, constraints=constraints)

    def client(self, folder: str) -> None:
        """Read a client's requirements.txt beside the model's; files that it names have to be the model's."""
        mine, self._folder = self._folder, folder
        before = set(self.local)
        try:
            self.file(REQUIREMENTS)
        finally:
            self._folder = mine
        for path in sorted(set(self.local) - before):
            self._problem(f"{folder}/{REQUIREMENTS} names the wheel {path!r}; log the wheel with the model instead")

    def lines(self, text: str, name: str, *, constraints: bool = False) -> None:
        """Read lines in pip's form; what is wrong with one is kept for `refuse`.

        Raises:
            InvalidVersion: this text and those before it are together larger than any real environment's.
        """
        self._bytes += len(text)
        self._text_lines += text.count("\n")
        self._bound(name, self._bytes, _MOST_BYTES, "characters")
        self._bound(name, self._text_lines, _MOST_TEXT_LINES, "lines")
        for number, content in logical_lines(text):
            self._lines += 1
            self._bound(name, self._lines, _MOST_LINES, "requirements and options")
            try:
                for line in parse_line(number, content):
                    if line.required:
                        self._add(line.required, constraints=constraints)
                    else:
                        self._option(line.option, line.value, name, constraints=constraints)
            except Unusable as error:
                self._problem(f"{name}, line {number}, {_shown(content, 120)!r}: {error}")

    def _bound(self, name: str, found: int, most: int, what: str) -> None:
        if found > most:
            message = f"The model's requirements are too large: with {name} they have more than {most:,} {what}."
            raise InvalidVersion(message, remedy=_CORRECT)

    def _add(self, required: Required, *, constraints: bool) -> None:
        if required.url:
            self._allow(required.url)
        if required.path and required.path not in self.local:
            found = digest_beneath(self._context, f"{self._folder}/{required.path}") if self._context else None
            if found is None:
                refuse_line(f"there is no file {required.path!r} in the model folder")
            self.local[required.path] = LocalWheel(path=required.path, sha256=found[0], size=found[1])
        if required.path and required.hashes and self.local[required.path].sha256 not in required.hashes:
            refuse_line("the file's hash is not one of those on the line")
        if constraints and (required.extras or required.url or required.path):
            refuse_line("a constraint cannot have extras, an address or a file")
        (self.constraints if constraints else self.required).append(required)

    def _option(self, option: str, value: str, name: str, *, constraints: bool) -> None:
        if option == "--pre":
            self.prereleases = True
        elif option == "--require-hashes":
            self.require_hashes = True
        elif option in {"--requirement", "--constraint"}:
            # pip looks beside the file that names it.
            path = f"{name.rpartition('/')[0]}/{value.removeprefix('./')}".removeprefix("/")
            if len(path) > _MOST_SHOWN or not SAFE_PATH.fullmatch(path):
                refuse_line("the file it names is not in the model folder")
            self.file(path, constraints=constraints or option == "--constraint")
        elif not is_pypi(value) or self._indexes.allows(checked_url(value)):
            # Where a model may not name PyPI, the configured index replaces it, or PyPI is the default anyway.
            self.indexes.append(self._allow(checked_url(value)).rstrip("/"))

    def _allow(self, url: str) -> str:
        """Return a canonical address that the model names, if it may."""
        if not self._indexes.allows(url):
            refuse_line(
                "a model may not name this address; an operator can allow it in ALLOWED_INDEXES, or configure it as an "
                "index in PIP_EXTRA_INDEX_URL"
            )
        return url

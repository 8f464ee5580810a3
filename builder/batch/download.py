"""`builder download`: versions as `DEST/<model>/v<N>`, each whole or not at all.

Beside `v<N>` stands `.v<N>.json`, which says what `v<N>` was made from, so that only what is new, changed or no longer
whole is downloaded. A folder is made under another name and then renamed; nothing here ever removes a version's folder,
that of a deleted version included.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from builder.batch.children import Children
from builder.budget import Budget, check_listing
from builder.dockerfile.template import DOCKERFILE_JINJA, DOCKERFILE_TEMPLATE, rendered
from builder.errors import BuilderError, Defect, ExitCode, InvalidVersion, VersionNotFound, of_kind
from builder.log import get_logger
from builder.masking import masked
from builder.models.catalog import MlflowCatalog
from builder.models.context import listing_digest, write_context
from builder.models.errors import on_disk
from builder.models.version import Artifact, Catalog, Inputs, ModelVersion, check_version_text, natural_order
from builder.reference import repository_component
from builder.settings import CatalogSettings

DOCKERFILE = "Dockerfile"
SCRIPT = "create_docker_image.sh"
# Gives the files to add to a version's folder, by name; none where the version has no templates.
Render = Callable[[ModelVersion, Path], Mapping[str, bytes]]
# Raises where a version has more artifacts than it may.
CheckListing = Callable[[Sequence[Artifact]], None]
State = Literal["new", "changed", "unchanged", "gone", "failed"]
# Part of what a folder was made from: raised when the same version would come out otherwise.
_LAYOUT = 2
_MODULES = ("mlflow", "builder.batch.download")
_log = get_logger("download")


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadResult:
    """What became of one version.

    Attributes:
        version: the version.
        folder: where it is, or would be.
        state: `gone` is a version that was deleted, before or while this ran, which is no failure; where a folder of it
            is there, it stays.
        error: why it failed; None where it did not.
    """

    version: ModelVersion
    folder: Path
    state: State
    error: BuilderError | None = None

    @property
    def exit_code(self) -> int:
        """The exit code that this result alone would end the process with."""
        return int(self.error.exit_code) if self.error else int(ExitCode.OK)


def download_all(
    settings: CatalogSettings, destination: Path, *, name: str = "", version: str = ""
) -> Iterator[DownloadResult]:
    """Download one version, a model's tagged versions, or every tagged version.

    Args:
        settings: where MLflow is, and what its templates may stand on.
        destination: the folder to write to; made where it does not exist.
        name: only this registered model.
        version: only this version of it, a number or an alias; it need not carry the target tag.

    Raises:
        VersionNotFound: the one version that was named does not exist.
        ServiceUnavailable, PermissionRefused: MLflow cannot be asked for the versions.
    """
    catalog = MlflowCatalog.from_settings(settings)
    if name and version:
        versions = [catalog.find(name, check_version_text(version))]
    else:
        versions = natural_order(found for found in catalog.tagged(settings.target_tag) if name in {"", found.name})
    destination = destination.absolute()
    results = _in_children(settings, destination, versions)
    return results if name and version else chain(results, _deleted(catalog, destination, versions, name))


def _deleted(
    catalog: Catalog, destination: Path, versions: Sequence[ModelVersion], name: str
) -> Iterator[DownloadResult]:
    """Yield the folders of versions that are no longer there; those of versions that lost their tag are left out.

    Args:
        catalog: where the versions are.
        destination: the folder that was written to.
        versions: those that are there.
        name: only this registered model; empty for all.
    """
    known = {(version.name, version.version) for version in versions}
    for path in sorted(destination.glob("*/.v*.json")):
        note = _Note.read(path)
        version = ModelVersion(name=note.name, version=note.version, created_ms=0)
        folder = _folder(destination, version) if note.name else path
        known_or_other = (note.name, note.version) in known or name not in {"", note.name}
        if known_or_other or path != _note_of(folder) or not folder.is_dir():
            continue
        try:
            catalog.find(version.name, version.version)
        except VersionNotFound:
            _log.warning("the version was deleted, and its folder stays", version=str(version), folder=str(folder))
            yield DownloadResult(version=version, folder=folder, state="gone")


def _in_children(
    settings: CatalogSettings, destination: Path, versions: Iterable[ModelVersion]
) -> Iterator[DownloadResult]:
    with Children(Budget.of(settings), modules=_MODULES) as children:
        for version in versions:
            yield _in_child(settings, children, destination, version)


def download(
    catalog: Catalog, destination: Path, versions: Iterable[ModelVersion], *, render: Render
) -> Iterator[DownloadResult]:
    """Download versions one after another, and yield what became of each; one that fails does not stop the others.

    Args:
        catalog: where the versions are.
        destination: the folder to write to; made where it does not exist.
        versions: what to download.
        render: see `Render`.
    """
    for version in versions:
        yield _guarded(catalog, destination, version, render)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """A result as a child answers it."""

    state: State
    exit_code: int = 0
    error: str = ""
    what: str = ""
    remedy: str = ""


def _in_child(
    settings: CatalogSettings, children: Children, destination: Path, version: ModelVersion
) -> DownloadResult:
    """Download a version in a child of its own."""
    folder = _folder(destination, version)
    unfinished = _unfinished(folder)
    try:
        work = partial(_answer, settings, destination, version)
        answer = children.run(work, _Answer, whose=str(version), folders=(unfinished,))
    except BuilderError as error:
        _log.error("the version could not be downloaded", version=str(version), error=error.one_line())
        shutil.rmtree(unfinished, ignore_errors=True)
        return DownloadResult(version=version, folder=folder, state="failed", error=error)
    failure = of_kind(answer.error, answer.exit_code, answer.what, answer.remedy) if answer.error else None
    return DownloadResult(version=version, folder=folder, state=answer.state, error=failure)


def _answer(settings: CatalogSettings, destination: Path, version: ModelVersion) -> _Answer:
    """Download a version: this is what a child does."""

    def render(version: ModelVersion, folder: Path) -> Mapping[str, bytes]:
        return rendered_files(settings, version, folder)

    check = partial(check_listing, settings, version)
    result = _guarded(MlflowCatalog.from_settings(settings), destination, version, render, check=check)
    if result.error is None:
        return _Answer(state=result.state)
    error = result.error
    return _Answer(
        state=result.state,
        exit_code=error.exit_code,
        error=type(error).__name__,
        what=masked(error.what),
        remedy=masked(error.remedy),
    )


def _guarded(
    catalog: Catalog, destination: Path, version: ModelVersion, render: Render, *, check: CheckListing | None = None
) -> DownloadResult:
    """Return what became of a version, its failure included: one must not keep the others from coming."""
    folder = _folder(destination, version)
    try:
        state = _download(catalog, version, folder, render, check)
    except VersionNotFound as error:
        _log.info("the version was deleted meanwhile", version=str(version), reason=error.what)
        return DownloadResult(version=version, folder=folder, state="gone")
    except BuilderError as error:
        _log.error("the version could not be downloaded", version=str(version), error=error.one_line())
        return DownloadResult(version=version, folder=folder, state="failed", error=error)
    except MemoryError:
        raise  # `Children` knows what it means
    except Exception as error:  # noqa: BLE001  # see above
        _log.exception("the version could not be downloaded", version=str(version))
        defect = Defect(f"{type(error).__name__} while {version} was downloaded.", remedy="See the log.")
        return DownloadResult(version=version, folder=folder, state="failed", error=defect)
    return DownloadResult(version=version, folder=folder, state=state)


def _folder(destination: Path, version: ModelVersion) -> Path:
    return destination / repository_component(version.name) / f"v{version.version}"


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _note_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.json")


def rendered_files(settings: CatalogSettings, version: ModelVersion, folder: Path) -> dict[str, bytes]:
    """Return a version's Dockerfile and script, made from its own templates, else from the built-in ones.

    The built-in ones take the place of no file of the version's. Where they cannot be made (no requirements.txt, a
    folder whose name may not stand in a Dockerfile), there are none: the version's files are of use without.

    Args:
        settings: the base images that templates may stand on.
        version: the version.
        folder: its artifacts.

    Raises:
        InvalidVersion: the version's own templates are wrong.
    """
    inputs = Inputs.of(version)
    templates = folder / inputs.templates_folder
    names = () if inputs.no_dockerfile else (DOCKERFILE_TEMPLATE, DOCKERFILE_JINJA)
    own = any((templates / name).is_file() for name in names)
    try:
        files = rendered(settings, version, folder)
    except InvalidVersion as error:
        if own:
            raise
        _log.warning("no Dockerfile can be made", version=str(version), why=error.what)
        return {}
    found = {DOCKERFILE: files.dockerfile, SCRIPT: files.script}
    return {name: content for name, content in found.items() if own or not (folder / name).exists()}


def _download(
    catalog: Catalog, version: ModelVersion, folder: Path, render: Render, check: CheckListing | None
) -> State:
    """Make a version's folder, unless it is there and was made from the same."""
    artifacts = catalog.artifacts(version)
    if check:
        check(artifacts)
    made_from = _made_from(version, artifacts)
    path = _note_of(folder)
    there, note = folder.is_dir(), _Note.read(path)
    if there and note.made_from == made_from and _whole(folder, artifacts, note.added):
        return "unchanged"
    new = _unfinished(folder)
    with on_disk(f"write {version} to {str(folder)!r}"):
        try:
            write_context(catalog, artifacts, new)
            added = render(version, new)
            _add(new, added)
        except BuilderError as error:
            if not error.retryable:
                # What was interrupted is taken up again; this would only lie around.
                shutil.rmtree(new, ignore_errors=True)
            raise
        # In this order a process that ends in between leaves what will be made again, never what only looks right.
        path.unlink(missing_ok=True)
        _put(new, folder)
        note = _Note(made_from=made_from, name=version.name, version=version.version, added=tuple(added))
        path.write_text(json.dumps(asdict(note)))
    return "changed" if there else "new"


def _made_from(version: ModelVersion, artifacts: tuple[Artifact, ...]) -> str:
    what = [_LAYOUT, version.source_id(), str(listing_digest(artifacts))]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    """What stands beside a version's folder.

    Attributes:
        made_from: a digest of what it was made from; empty where that cannot be told, as all else is then.
        name: the registered model's.
        version: its number.
        added: the files in it that are no artifacts.
    """

    made_from: str = ""
    name: str = ""
    version: str = ""
    added: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> _Note:
        with suppress(OSError, ValueError, TypeError, AttributeError):
            found = json.loads(path.read_text())
            words = {key: str(found[key]) for key in ("made_from", "name", "version") if key in found}
            return cls(**words, added=tuple(map(str, found.get("added", ()))))
        return cls()


def _whole(folder: Path, artifacts: Iterable[Artifact], added: Collection[str]) -> bool:
    """Return whether every file is there that belongs into a version's folder, in its size where that is known."""
    sizes = {artifact.path: artifact.size for artifact in artifacts} | dict.fromkeys(added)
    for path, size in sizes.items():
        file = folder / path
        if not file.is_file() or (size is not None and file.stat().st_size != size):
            return False
    return True


def _add(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write rendered files at the top of a version's folder, in the place of artifacts of these names."""
    for name, content in files.items():
        path = folder / name
        if path.is_dir():
            message = f"The version has a folder {name!r} where a rendered file belongs."
            raise InvalidVersion(message, remedy="Log that folder under another name, and register again.")
        path.write_bytes(content)
        path.chmod(0o755 if path.suffix == ".sh" else 0o644)


def _put(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; what was there before is removed only when that has worked."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if folder.is_dir():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)

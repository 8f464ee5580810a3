"""`builder download`: versions as `DEST/<model>/v<N>`, each whole or not at all.

Beside `v<N>` is `.v<N>.json`, which says what `v<N>` was made from, so that only what is new, changed or no longer
whole is downloaded. A folder is made under another name and then renamed; nothing here ever removes a version's folder,
that of a deleted version included.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from builder.batch import Batch, Children, Result, State
from builder.budget import Budget, check_listing
from builder.dockerfile.template import DOCKERFILE_JINJA, DOCKERFILE_TEMPLATE, rendered
from builder.errors import BuilderError, InvalidVersion, VersionNotFound
from builder.log import get_logger
from builder.models import Artifact, Catalog, Inputs, ModelVersion, check_version_text, natural_order
from builder.models.catalog import MlflowCatalog
from builder.models.context import listing_digest, write_context
from builder.models.errors import on_disk
from builder.reference import repository_component
from builder.settings import CatalogSettings

DOCKERFILE = "Dockerfile"
SCRIPT = "create_docker_image.sh"
# Gives the files to add to a version's folder, by name; none where the version has no templates.
Render = Callable[[ModelVersion, Path], Mapping[str, bytes]]
# Raises where a version has more artifacts than it may.
CheckListing = Callable[[Sequence[Artifact]], None]
# Part of what a folder was made from: raised when the same version would come out otherwise.
_LAYOUT = 2
_log = get_logger("download")
_DOWNLOAD = Batch(
    kind=Result,
    logger="download",
    modules=("mlflow", "builder.batch.download"),
    failed="the version could not be downloaded",
    gone="the version was deleted meanwhile",
)


def download_all(
    settings: CatalogSettings, destination: Path, *, name: str = "", version: str = ""
) -> Iterator[Result]:
    """Download one version, a model's tagged versions, or every tagged version.

    Args:
        settings: where MLflow is, and the base images that templates may use.
        destination: the folder to write to; made where it does not exist.
        name: only this registered model.
        version: only this version of it, a number or an alias; it need not carry the target tag.

    Raises:
        VersionNotFound: the one version that was named does not exist.
        ServiceUnavailable, PermissionRefused: MLflow cannot list the versions.
    """
    catalog = MlflowCatalog.from_settings(settings)
    if name and version:
        versions = [catalog.find(name, check_version_text(version))]
    else:
        versions = natural_order(found for found in catalog.tagged(settings.target_tag) if name in {"", found.name})
    destination = destination.absolute()
    work = partial(_in_child, settings, destination)
    results = _with_folders(destination, _DOWNLOAD.results(Budget.of(settings), versions, work))
    return results if name and version else chain(results, _deleted(catalog, destination, versions, name))


def _deleted(catalog: Catalog, destination: Path, versions: Sequence[ModelVersion], name: str) -> Iterator[Result]:
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
            yield Result(name=str(version), version=version, folder=folder, state="gone")


def download(
    catalog: Catalog, destination: Path, versions: Iterable[ModelVersion], *, render: Render
) -> Iterator[Result]:
    """Download versions one after another, and yield what became of each; one that fails does not stop the others.

    Args:
        catalog: where the versions are.
        destination: the folder to write to; made where it does not exist.
        versions: what to download.
        render: see `Render`.
    """
    results = (
        _DOWNLOAD.result(version, partial(_downloaded, catalog, destination, version, render)) for version in versions
    )
    return _with_folders(destination, results)


def _with_folders(destination: Path, results: Iterable[Result]) -> Iterator[Result]:
    """Yield results, each with the version's folder, whatever became of it."""
    for result in results:
        yield replace(result, folder=_folder(destination, result.version) if result.version else None)


def _in_child(settings: CatalogSettings, destination: Path, children: Children, version: ModelVersion) -> Result:
    """Download a version in a child of its own."""
    unfinished = _unfinished(_folder(destination, version))

    def ended(_error: BuilderError) -> None:
        shutil.rmtree(unfinished, ignore_errors=True)

    work = partial(_with_settings, settings, destination, version)
    return children.run(work, Result, whose=str(version), folders=(unfinished,), ended=ended)


def _with_settings(settings: CatalogSettings, destination: Path, version: ModelVersion) -> Result:
    """Download a version: this is what a child does."""
    catalog = MlflowCatalog.from_settings(settings)
    check = partial(check_listing, settings, version)
    with _DOWNLOAD.defects(str(version)):
        return _downloaded(catalog, destination, version, partial(rendered_files, settings), check=check)


def _downloaded(
    catalog: Catalog, destination: Path, version: ModelVersion, render: Render, *, check: CheckListing | None = None
) -> Result:
    state = _download(catalog, version, _folder(destination, version), render, check)
    return Result(name=str(version), state=state)


def _folder(destination: Path, version: ModelVersion) -> Path:
    return destination / repository_component(version.name) / f"v{version.version}"


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _note_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.json")


def rendered_files(settings: CatalogSettings, version: ModelVersion, folder: Path) -> dict[str, bytes]:
    """Return a version's Dockerfile and script, made from its own templates, else from the built-in ones.

    The built-in ones take the place of no file of the version's. Where they cannot be made (no requirements.txt, a
    folder whose name is not allowed in a Dockerfile), there are no such files: the version's own are of use without.

    Args:
        settings: the base images that templates may use.
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
    """The file beside a version's folder.

    Attributes:
        made_from: a digest of what it was made from; empty, as all else is then, where that is unknown.
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
            message = f"The version has a folder {name!r}, and the rendered file of this name has no place."
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

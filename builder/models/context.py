"""The context: a version's artifacts in a folder of ours, whole, without links, always in the same way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import threading
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote

from builder.errors import InvalidSettings, InvalidVersion, TryAgain
from builder.models import TAG_MODEL_FOLDER, Inputs
from builder.models.errors import on_disk
from builder.process import side_by_side
from builder.reference import Digest
from builder.safe_open import checked_path, digest_beneath

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from builder.models import Artifact, ModelVersion


MODEL_FILE = "MLmodel"
MOST_FILES = 100_000
# What may name modules: Python files, and what people call pickles and the archives that hold some.
_CODE = (".py",)
_PICKLES = (
    *(".cloudpickle", ".dill", ".fastai", ".jl", ".joblib", ".model", ".p", ".pck", ".pickle", ".pkl", ".pmd", ".pt"),
    *(".pth", ".sav", ".shap", ".skops", ".statsmodels"),
)
_PACKED = re.compile(r"\.(?:bz2|gz|lzma|xz|z)$")


def names_modules(path: str) -> bool:
    """Return whether a file may name the modules that the model needs: Python's source, or a pickle."""
    return path.endswith(_CODE) or _PACKED.sub("", path).endswith(_PICKLES)


def union(
    artifacts: Iterable[Artifact], *, same: Callable[[Artifact, Artifact], bool], whose: str
) -> tuple[Artifact, ...]:
    """Return artifacts ordered by path, each path once.

    The same file may be both in the run and in the logged model; then the later one of `artifacts` is taken.

    Args:
        artifacts: files with checked paths.
        same: whether two artifacts have the same content; called only where they have the same path.
        whose: the version they belong to, for errors.

    Raises:
        InvalidVersion: two files of different content have the same path, a file's path is another one's folder, or
            there are too many files.
    """
    found: dict[str, Artifact] = {}
    for artifact in artifacts:
        other = found.get(artifact.path)
        # Within one folder two paths are two files, however alike they are once normalised.
        if other and (other.root == artifact.root or not same(other, artifact)):
            message = f"{whose} has two different files at {artifact.path!r}: {_origin(other)} and {_origin(artifact)}."
            raise InvalidVersion(message, remedy="Remove one, or log it under another name, and register again.")
        found[artifact.path] = artifact
        if len(found) > MOST_FILES:
            message = f"{whose} has more than {MOST_FILES} files."
            raise InvalidVersion(message, remedy="Pack them into an archive before they are logged.")
    for path in found:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if (folder := "/".join(parts[:depth])) in found:
                message = f"{whose} has a file {folder!r} and a folder of the same name."
                raise InvalidVersion(message, remedy="Log one of them under another name, and register again.")
    return tuple(found[path] for path in sorted(found))


def _origin(artifact: Artifact) -> str:
    return f"{artifact.remote!r} ({'?' if artifact.size is None else artifact.size} bytes)"


def find_model_folder(paths: Iterable[str], inputs: Inputs) -> str:
    """Return the model folder: the one that MODEL_FOLDER names, else the one that holds MLmodel.

    Of several, the version's source names the one that was registered. A model may hold other models below its own
    folder; they do not count unless the source names them.

    Args:
        paths: the paths of the context's files.
        inputs: what the version's tags ask for.

    Raises:
        InvalidVersion: MODEL_FOLDER names a folder that is not there; there is no MLmodel, or several; or it is in no
            folder.
    """
    paths = list(paths)
    if inputs.model_folder:
        if not any(path.startswith(f"{inputs.model_folder}/") for path in paths):
            message = f"The tag {TAG_MODEL_FOLDER} is {inputs.model_folder!r}, but there is no artifact in that folder."
            raise InvalidVersion(message, remedy=f"Set {TAG_MODEL_FOLDER} to the folder that holds {MODEL_FILE}.")
        return inputs.model_folder
    holders = {path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] == MODEL_FILE}
    outer = sorted(folder for folder in holders if holders.isdisjoint(_above(folder)))
    if not outer:
        message = f"No artifact is called {MODEL_FILE}, so there is no model folder."
        raise InvalidVersion(message, remedy=f"Log a model, or name its folder by the tag {TAG_MODEL_FOLDER}.")
    if folder := _named_by(inputs.source, holders):
        return folder
    if len(outer) > 1:
        names = ", ".join(repr(folder) for folder in outer[:10])
        message = f"Several folders hold a file {MODEL_FILE}: {names}."
        raise InvalidVersion(message, remedy=f"Name the one to publish by the tag {TAG_MODEL_FOLDER}.")
    if not outer[0]:
        message = f"The file {MODEL_FILE} is at the top of the version's artifacts, in no folder of its own."
        raise InvalidVersion(
            message,
            remedy=f"Log the model in a folder; a logged model's can be named by the tag {TAG_MODEL_FOLDER}.",
        )
    return outer[0]


def _named_by(source: str, folders: Collection[str]) -> str:
    """Return the folder that a version's source ends with, the longest if there are several; empty for none."""
    source = "/" + source.strip("/")
    ways = {unicodedata.normalize("NFC", each) for each in (source, unquote(source))}
    return max(
        (folder for folder in folders if folder and any(way.endswith(f"/{folder}") for way in ways)),
        key=len,
        default="",
    )


def _above(folder: str) -> Iterator[str]:
    """Yield the folders that a folder lies in, itself and the root apart."""
    end = folder.find("/")
    while end >= 0:
        yield folder[:end]
        end = folder.find("/", end + 1)


_THREADS = 8
_REPORT_SECONDS = 0.5
# A file takes at least a block, and something should be left for other programs that write to the disk.
_BLOCK = 4096
_SPARE = 16 << 20
# 1980-01-02, the first day that every archive format can hold.
_TIME = 315619200
_MOST_SKETCHED = 4 << 20
# Of one file that names modules, and of all; larger ones are read when they are here.
_MOST_NAMING, _MOST_NAMING_TOGETHER = 16 << 20, 64 << 20
# What describes a model: read before its files are, to render a Dockerfile.
_DESCRIPTION = (MODEL_FILE, "python_env.yaml", "conda.yaml", "requirements.txt")


class Progress(Protocol):
    """Shows how far a download is; called some times a second, in the thread that began the download."""

    def __call__(self, done: int, total: int) -> None:
        """Show it.

        Args:
            done: bytes that are here, those of unfinished files included.
            total: bytes there will be, as far as the store tells sizes.
        """
        ...


class Downloads(Protocol):
    """Gives artifacts, as a `Catalog` does."""

    def download(self, artifact: Artifact, destination: Path) -> None:
        """Write one artifact's bytes to the file `destination`, whose folder exists."""
        ...


def write_context(
    catalog: Downloads, artifacts: Sequence[Artifact], folder: Path, *, progress: Progress | None = None
) -> None:
    """Write a version's artifacts into `folder`, and nothing else: what was there before is removed.

    Files that an interrupted call for the same artifacts left there are kept: each was moved into its place when it was
    whole. Every file is readable by all, executable by none and of the same time, so that two contexts of a version are
    the same.

    Args:
        catalog: where the artifacts are.
        artifacts: a version's artifacts, as the catalog listed them.
        folder: where to; it and its parents are made.
        progress: called with how far the download is.

    Raises:
        TryAgain: there is too little space, or the disk is full.
        InvalidVersion: a path is not safe, or two files meet on a file system that ignores case.
        InvalidSettings: the folder is a link, or may not be written to.
        ServiceUnavailable, PermissionRefused: as the catalog's `download`.
    """
    _check_paths(artifacts)
    with on_disk(f"write the context {str(folder)!r}"):
        unfinished = _prepared(folder, str(listing_digest(artifacts, origins=True)))
        kept = _kept(folder, artifacts)
        missing = [artifact for artifact in artifacts if artifact.path not in kept]
        _check_space(folder, missing)
        _fetch(catalog, missing, folder, unfinished, _reporter(progress, artifacts, kept, unfinished))
        _settle(folder)
        shutil.rmtree(unfinished)


def sketch_context(catalog: Downloads, version: ModelVersion, artifacts: Sequence[Artifact], folder: Path) -> Described:
    """Write what planning reads of a version: templates, requirements, wheels, code; the rest as empty files.

    Args:
        catalog: where the artifacts are.
        version: the version.
        artifacts: its artifacts, as the catalog listed them.
        folder: an empty folder.

    Returns:
        What gives the same artifacts, those from here that were written.

    Raises:
        BuilderError: as `write_context`; InvalidVersion also where the version has no model folder.
    """
    _check_paths(artifacts)
    inputs = Inputs.of(version)
    model_folder = find_model_folder([artifact.path for artifact in artifacts], inputs)

    def one(artifact: Artifact) -> str:
        catalog.download(artifact, folder / artifact.path)
        return artifact.path

    with on_disk(f"write a sketch of {version}"):
        read = [artifact for artifact in artifacts if _describes(artifact, inputs, model_folder)]
        read = list(dict.fromkeys([*read, *_naming(artifacts, inputs, model_folder)]))
        _check_space(folder, read)
        for artifact in artifacts:
            path = folder / artifact.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        done = side_by_side(one, read, threads=_THREADS, every=_REPORT_SECONDS)
        return Described(catalog, folder, {path for path in done if path is not None})


def _describes(artifact: Artifact, inputs: Inputs, model_folder: str) -> bool:
    path, within = artifact.path, artifact.path.startswith(f"{model_folder}/") or not model_folder
    named = (
        (within and path.removeprefix(f"{model_folder}/") in _DESCRIPTION)
        or path.startswith(f"{inputs.templates_folder}/")
        or path == f"{inputs.client_folder}/requirements.txt"
        # What requirements may name: further lists, and wheels.
        or (within and path.endswith((".txt", ".whl")))
    )
    return named and ((artifact.size or 0) <= _MOST_SKETCHED or path.endswith(".whl"))


def _naming(artifacts: Sequence[Artifact], inputs: Inputs, model_folder: str) -> list[Artifact]:
    """Return those that name modules, the smallest first, as many as may be read beforehand; none for a Dockerfile."""
    template = f"{inputs.templates_folder}/Dockerfile."
    if not inputs.no_dockerfile and any(artifact.path.startswith(template) for artifact in artifacts):
        return []
    folders = (f"{model_folder}/", f"{inputs.client_folder}/")
    named = [
        (artifact.size, artifact.path, artifact)
        for artifact in artifacts
        if artifact.size is not None
        and artifact.size <= _MOST_NAMING
        and artifact.path.startswith(folders)
        and names_modules(artifact.path)
    ]
    taken, left = [], _MOST_NAMING_TOGETHER
    for size, _, artifact in sorted(named, key=lambda each: each[:2]):
        left -= size
        if left < 0:
            break
        taken.append(artifact)
    return taken


class Described:
    """Gives a version's artifacts; those that a sketch has are moved from there, each once.

    Args:
        catalog: gives all others.
        folder: the sketch.
        paths: of the files that are whole there.
    """

    def __init__(self, catalog: Downloads, folder: Path, paths: set[str]) -> None:
        self._catalog = catalog
        self._folder = folder
        self._paths = paths

    def download(self, artifact: Artifact, destination: Path) -> None:
        """Write one artifact's bytes to the file `destination`; see `Catalog.download`."""
        try:
            self._paths.remove(artifact.path)
        except KeyError:
            self._catalog.download(artifact, destination)
        else:
            shutil.move(self._folder / artifact.path, destination)


def listing_digest(artifacts: Sequence[Artifact], *, origins: bool = False) -> Digest:
    """Return a digest of a listing: of the files' paths and sizes.

    Args:
        artifacts: the files.
        origins: whether the files' places in the artifact store count as well.
    """
    lines = sorted(
        [artifact.path, -1 if artifact.size is None else artifact.size]
        + ([artifact.root, artifact.remote] if origins else [])
        for artifact in artifacts
    )
    return Digest.of(json.dumps(lines).encode())


def _check_paths(artifacts: Sequence[Artifact]) -> None:
    """Raise InvalidVersion unless every path is as the catalog makes it; a listing may come from elsewhere."""
    for artifact in artifacts:
        if checked_path(artifact.path) != artifact.path:
            message = f"The artifact {artifact.path!r} is not in Unicode's normal form C."
            raise InvalidVersion(message, remedy="List the version's artifacts again.")


def _prepared(folder: Path, identity: str) -> Path:
    """Return the folder for unfinished files, beside `folder`; empty `folder` unless it was begun for `identity`.

    The folder of unfinished files lives as long as the context is not whole, and holds what it is being made for.
    """
    if folder.is_symlink():
        message = f"The folder {str(folder)!r} is a link."
        raise InvalidSettings(message, remedy="Remove it, or name another workspace by BUILDER_WORKSPACE.")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    mark = unfinished / "identity"
    begun = not unfinished.is_symlink() and mark.is_file() and mark.read_text() == identity
    folder.mkdir(parents=True, exist_ok=True)
    if not begun:
        for child in folder.iterdir():
            _remove(child)
    _remove(unfinished)
    unfinished.mkdir(mode=0o700)
    mark.write_text(identity)
    return unfinished


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _kept(folder: Path, artifacts: Sequence[Artifact]) -> set[str]:
    """Return the paths of the files that are here already, and remove whatever else there is."""
    sizes = {artifact.path: artifact.size for artifact in artifacts}
    kept = set()
    for path, status in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if stat.S_ISREG(status.st_mode) and sizes.get(name) == status.st_size:
            kept.add(name)
        else:
            path.unlink()
    return kept


def _check_space(folder: Path, missing: Sequence[Artifact]) -> None:
    """Raise TryAgain if the files cannot fit; files whose size is not known count as a block."""
    needed = sum(max(artifact.size or 0, _BLOCK) for artifact in missing) + _SPARE
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"The artifacts need {needed >> 20} MiB in {str(folder)!r}, and {free >> 20} MiB are free."
        raise TryAgain(message, remedy="Free space, or name a folder on a larger disk by BUILDER_WORKSPACE.")


def _reporter(
    progress: Progress | None, artifacts: Sequence[Artifact], kept: set[str], unfinished: Path
) -> Callable[[Sequence[Artifact]], None]:
    """Return a function that reports how far a download is, given the artifacts that have arrived by now."""
    known = sum(artifact.size or 0 for artifact in artifacts)
    before = sum(artifact.size or 0 for artifact in artifacts if artifact.path in kept)

    def report(arrived: Sequence[Artifact]) -> None:
        if progress:
            size = before + sum(artifact.size or 0 for artifact in arrived) + _arriving(unfinished)
            progress(min(size, known), known)

    return report


def _arriving(unfinished: Path) -> int:
    """Return the bytes of the files that are on their way; they come and go while they are counted."""
    size = 0
    with contextlib.suppress(OSError):
        for path in unfinished.glob(".part-*/*"):
            size += path.stat().st_size
    return size


def _fetch(
    catalog: Downloads,
    missing: Sequence[Artifact],
    folder: Path,
    unfinished: Path,
    report: Callable[[Sequence[Artifact]], None],
) -> None:
    """Download artifacts side by side, the largest first; the first error ends it."""

    def one(item: tuple[int, Artifact]) -> Artifact:
        index, artifact = item
        part = unfinished / str(index)
        catalog.download(artifact, part)
        destination = folder / artifact.path
        destination.parent.mkdir(parents=True, exist_ok=True)
        with placing:
            if os.path.lexists(destination):
                message = f"The artifact {artifact.path!r} and another one have the same name on this file system."
                raise InvalidVersion(message, remedy="Log one of them under another name, and register again.")
            part.rename(destination)
        return artifact

    # Two threads must not both see that a name is free.
    placing = threading.Lock()
    arrived: list[Artifact] = []
    report(arrived)
    order = sorted(enumerate(missing), key=lambda item: -(item[1].size or 0))
    for artifact in side_by_side(one, order, threads=_THREADS, every=_REPORT_SECONDS):
        if artifact:
            arrived.append(artifact)
        report(arrived)


def _settle(folder: Path) -> None:
    """Give every file and folder the same mode and time, whatever the store gave it."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(root, name)
            path.chmod(0o644)
            os.utime(path, (_TIME, _TIME))
        Path(root).chmod(0o755)
        os.utime(root, (_TIME, _TIME))


def _walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield everything below a folder that is not a folder itself, links not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=refuse):
        for name in files + [name for name in folders if Path(root, name).is_symlink()]:
            path = Path(root, name)
            yield path, path.lstat()


def content_digest(folder: Path) -> Digest:
    """Return a digest of a folder's files: their paths, sizes and content, nothing of times or modes.

    Raises:
        InvalidVersion: there is something that is neither a file nor a folder, such as a link.
    """
    lines = []
    with on_disk(f"read {str(folder)!r}"):
        for path, status in _walk(folder):
            name = path.relative_to(folder).as_posix()
            if not stat.S_ISREG(status.st_mode):
                message = f"{name!r} in the context is neither a file nor a folder."
                raise InvalidVersion(message, remedy="Fetch the version again.")
            found = digest_beneath(folder, name)
            if found is None:
                message = f"{name!r} in the context has vanished."
                raise InvalidVersion(message, remedy="Fetch the version again.")
            lines.append([name, found[1], found[0]])
    return Digest.of(json.dumps(sorted(lines)).encode())

"""A context on disk: whole, without links, always the same."""

from __future__ import annotations

import os
import shutil
import threading

import pytest

from builder.errors import InvalidSettings, InvalidVersion, ServiceUnavailable, TryAgain
from builder.models import Artifact, ModelVersion
from builder.models import context as module
from builder.models.context import content_digest, listing_digest, sketch_context, write_context
from tests.waiting import HANG


class Store:
    """A catalog whose files are bytes in memory; real stores are read in test_mlflow_catalog.py."""

    def __init__(self, files):
        self.files = dict(files)
        self.asked = []
        self.broken = {}

    def listing(self):
        return tuple(
            Artifact(path=path, size=len(content), root="x:/1", remote=path)
            for path, content in sorted(self.files.items())
        )

    def download(self, artifact, destination):
        self.asked.append(artifact.path)
        if artifact.path in self.broken:
            raise self.broken[artifact.path]
        destination.write_bytes(self.files[artifact.path])


FILES = {
    "mymodel/MLmodel": b"flavors: {}\n",
    "mymodel/data/weights.bin": b"w" * 100_000,
    "mymodel/requirements.txt": b"numpy\n",
    "client/app.py": b"print()\n",
    "templates/Dockerfile.template": b"FROM scratch\n",
    "empty": b"",
}


@pytest.fixture
def store():
    return Store(FILES)


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_a_context_is_the_artifacts_and_nothing_else(store, tmp_path):
    folder = tmp_path / "work" / "context"
    folder.mkdir(parents=True)
    (folder / "left over").write_text("x")
    (folder / "a folder").mkdir()
    (folder / "a folder" / "x").write_text("x")
    (folder / "a link").symlink_to("/etc")
    told = []
    write_context(store, store.listing(), folder, progress=lambda done, total: told.append((done, total)))
    assert tree(folder) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["context"]
    assert not (folder / "a folder").exists()
    total = sum(map(len, FILES.values()))
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_two_contexts_of_a_version_are_the_same_to_the_second(store, tmp_path):
    def states(folder):
        paths = [folder, *folder.rglob("*")]
        return {str(path.relative_to(folder)): (path.stat().st_mode, path.stat().st_mtime_ns) for path in paths}

    for name in ("one", "two"):
        write_context(store, store.listing(), tmp_path / name)
    assert states(tmp_path / "one") == states(tmp_path / "two")
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")
    assert not any(path.stat().st_mode & 0o111 for path in (tmp_path / "one").rglob("*") if path.is_file())


def test_what_was_interrupted_is_taken_up_again(store, tmp_path):
    folder = tmp_path / "context"
    store.broken = {"mymodel/requirements.txt": ServiceUnavailable("away")}
    with pytest.raises(ServiceUnavailable):
        write_context(store, store.listing(), folder)
    had = set(tree(folder))
    assert "mymodel/requirements.txt" not in had
    (folder / "strange").write_text("x")
    (folder / "link").symlink_to("/etc/passwd")
    if "client/app.py" in had:
        (folder / "client/app.py").write_bytes(b"cut")
    store.broken, store.asked = {}, []
    write_context(store, store.listing(), folder)
    assert tree(folder) == FILES
    assert not (folder / "link").is_symlink()
    assert not set(store.asked) & (had - {"client/app.py"})
    assert "mymodel/requirements.txt" in store.asked


def test_a_context_that_is_whole_is_made_anew(store, tmp_path):
    folder = tmp_path / "context"
    write_context(store, store.listing(), folder)
    # As long as before, so that only a new download can tell.
    store.files["client/app.py"] = b"PRINT()\n"
    write_context(store, store.listing(), folder)
    assert (folder / "client/app.py").read_bytes() == b"PRINT()\n"


def test_what_another_version_left_is_not_taken_up(store, tmp_path):
    folder = tmp_path / "context"
    store.broken = {"mymodel/requirements.txt": ServiceUnavailable("away")}
    with pytest.raises(ServiceUnavailable):
        write_context(store, store.listing(), folder)
    other = Store({path: content.swapcase() for path, content in FILES.items()})
    moved = tuple(artifact.model_copy(update={"root": "x:/2"}) for artifact in other.listing())
    write_context(other, moved, folder)
    assert tree(folder) == other.files


def test_files_come_side_by_side(store, tmp_path):
    together = threading.Barrier(4, timeout=HANG)
    inner = store.download

    def meet(artifact, destination):
        if artifact.path not in {"empty", "mymodel/MLmodel"}:
            together.wait()
        inner(artifact, destination)

    store.download = meet
    write_context(store, store.listing(), tmp_path / "context")
    assert tree(tmp_path / "context") == FILES


def test_the_first_failed_download_stops_the_others(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_THREADS", 1)
    store.broken = {"mymodel/data/weights.bin": InvalidVersion("gone")}
    with pytest.raises(InvalidVersion, match="gone"):
        write_context(store, store.listing(), tmp_path / "context")
    assert store.asked == ["mymodel/data/weights.bin"]


def test_too_little_space_is_said_before_anything_is_downloaded(store, tmp_path):
    listing = [artifact.model_copy(update={"size": 1 << 60}) for artifact in store.listing()]
    with pytest.raises(TryAgain, match=r"need 6597069766672 MiB .* are free"):
        write_context(store, listing, tmp_path / "context")
    assert store.asked == []


def test_files_whose_size_nobody_knows_are_taken(store, tmp_path):
    listing = [artifact.model_copy(update={"size": None}) for artifact in store.listing()]
    write_context(store, listing, tmp_path / "context")
    assert tree(tmp_path / "context") == FILES


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system of its own, which only root may mount")
def test_a_disk_that_fills_up_can_be_tried_again(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.spawnlp(os.P_WAIT, "mount", "mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)):
        pytest.skip("this machine lets nobody mount")
    try:
        store = Store({"mymodel/large": b"x" * (21 << 20)})
        listing = [artifact.model_copy(update={"size": None}) for artifact in store.listing()]
        with pytest.raises(TryAgain, match="disk is full"):
            write_context(store, listing, disk / "context")
        assert tree(disk / "context") == {}
    finally:
        os.spawnlp(os.P_WAIT, "umount", "umount", str(disk))


def test_a_folder_that_is_a_link_is_not_written_through(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "context").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidSettings, match="is a link"):
        write_context(store, store.listing(), tmp_path / "context")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("path", ["../escaped", "/escaped", "a\nb", "cafe\u0301"])
def test_a_listing_from_elsewhere_is_checked_again(store, tmp_path, path):
    listing = [Artifact(path=path, size=1, root="x:/1", remote="empty")]
    with pytest.raises(InvalidVersion):
        write_context(store, listing, tmp_path / "context")
    assert store.asked == []


def test_two_files_that_meet_on_the_disk_are_refused(store, tmp_path):
    twice = [*store.listing(), store.listing()[0]]
    with pytest.raises(InvalidVersion, match="same name on this file system"):
        write_context(store, twice, tmp_path / "context")


# ---- digests


def test_a_content_digest_tells_every_change(tmp_path):
    def made(name, files):
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(content)
        return content_digest(tmp_path / name)

    digests = [
        made("0", FILES),
        made("1", {**FILES, "client/app.py": b"PRINT()\n"}),
        made("2", {**FILES, "new": b""}),
        made("3", {path.upper(): content for path, content in FILES.items()}),
        made("4", {}) if (tmp_path / "4").mkdir() is None else None,
    ]
    assert len(set(digests)) == len(digests)
    os.utime(tmp_path / "0" / "empty", (1, 1))
    (tmp_path / "0" / "empty").chmod(0o755)
    assert content_digest(tmp_path / "0") == digests[0]


@pytest.mark.parametrize("kind", ["link", "link to a folder", "dangling", "pipe"])
def test_a_content_digest_is_of_files_alone(tmp_path, kind):
    (tmp_path / "a").mkdir()
    odd = tmp_path / "a" / "odd"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to({"link": "/etc/passwd", "link to a folder": "/etc", "dangling": "nowhere"}[kind])
    with pytest.raises(InvalidVersion, match="'a/odd'"):
        content_digest(tmp_path)


def test_a_listing_digest_is_of_paths_and_sizes():
    listing = Store(FILES).listing()
    moved = [artifact.model_copy(update={"root": "y:/"}) for artifact in reversed(listing)]
    assert listing_digest(listing) == listing_digest(moved)
    assert listing_digest(listing, origins=True) != listing_digest(moved, origins=True)
    larger = [artifact.model_copy(update={"size": (artifact.size or 0) + 1}) for artifact in listing]
    unknown = [artifact.model_copy(update={"size": None}) for artifact in listing]
    assert len({listing_digest(listing), listing_digest(larger), listing_digest(unknown), listing_digest([])}) == 4


def test_a_sketch_has_every_file_and_reads_few(store, tmp_path):
    version = ModelVersion(name="m", version="1", created_ms=0)
    sketch_context(store, version, store.listing(), tmp_path)
    assert tree(tmp_path).keys() == FILES.keys()
    read = {"mymodel/MLmodel", "mymodel/requirements.txt", "templates/Dockerfile.template"}
    assert set(store.asked) == read
    assert {path: content for path, content in tree(tmp_path).items() if content} == {
        path: FILES[path] for path in read
    }


def test_a_sketch_has_what_names_modules_where_no_dockerfile_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_NAMING", 100)
    monkeypatch.setattr(module, "_MOST_NAMING_TOGETHER", 250)
    naming = {
        "mymodel/python_model.pkl": b"p" * 90,
        "mymodel/code/helper.py": b"h" * 91,
        "client/app.py": b"a",
    }
    others = {
        "mymodel/b.pkl.gz": b"b" * 92,  # together too much
        "mymodel/large.pkl": b"l" * 101,
        "notes/other.py": b"x = 1\n",
        "mymodel/data/weights.bin": b"w",
    }
    store = Store({"mymodel/MLmodel": b"flavors: {}\n", **naming, **others})
    listing = store.listing()
    for name in "ab":
        (tmp_path / name).mkdir()
    sketch_context(store, ModelVersion(name="m", version="1", created_ms=0), listing, tmp_path / "a")
    assert set(store.asked) == {"mymodel/MLmodel", *naming}
    # Of a file whose size the store does not tell nobody knows how long it takes.
    store.asked.clear()
    unknown = tuple(artifact.model_copy(update={"size": None}) for artifact in listing)
    sketch_context(store, ModelVersion(name="m", version="1", created_ms=0), unknown, tmp_path / "b")
    assert set(store.asked) == {"mymodel/MLmodel"}


# ---- from a real server


def test_a_context_from_a_real_server(any_shelf, model, client_programs, tmp_path):
    version = any_shelf.in_run((model, "mymodel"), (client_programs, "client"))
    folder = tmp_path / "context"
    write_context(any_shelf.catalog, any_shelf.catalog.artifacts(version), folder)
    wanted = tmp_path / "wanted"
    shutil.copytree(model, wanted / "mymodel")
    shutil.copytree(client_programs, wanted / "client")
    assert tree(folder) == tree(wanted)
    assert content_digest(folder) == content_digest(wanted)

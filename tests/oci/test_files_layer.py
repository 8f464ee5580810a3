"""Layers made from files: what is in them, when they are the same, and which files are refused."""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
import tracemalloc
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.clients import Registries
from builder.errors import BuildFailed, InvalidVersion, TryAgain
from builder.oci import OCI_LAYER, check, verified
from builder.oci.authn import Credentials
from builder.oci.files_layer import BUCKET, LARGE, FileEntry, FilesLayer, split
from builder.oci.layer import END, MTIME, file_header
from builder.reference import Digest, Repository

MODEL = {
    "app/mymodel/MLmodel": b"flavors: {}\n",
    "app/mymodel/empty": b"",
    "app/mymodel/block": b"x" * 512,
    "app/mymodel/data/weights.bin": random.Random(1).randbytes(3 << 20),
    "app/client/app.py": b"print(1)\n",
    "top.txt": b"top",
}


def make(folder: Path, files: dict[str, bytes], programs: tuple[str, ...] = ()) -> list[FileEntry]:
    entries = []
    for number, (path, content) in enumerate(files.items()):
        # Names on disk have nothing to do with those in the image.
        source = folder / f"part{number % 2}" / f"file{number}"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(content)
        entries.append(FileEntry(path=path, source=source, size=len(content), executable=path in programs))
    return entries


def one(folder: Path, content: bytes = b"content", path: str = "a") -> FileEntry:
    (entry,) = make(folder, {path: content})
    return entry


def nowhere(path: str, size: int = 0) -> FileEntry:
    return FileEntry(path=path, source=Path("/nonexistent") / "file", size=size)


def unpacked(layer: FilesLayer) -> tuple[dict[str, tarfile.TarInfo], dict[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(layer.stream())), mode="r:gz") as archive:
        members = archive.getmembers()
        found = {member.name: member for member in members}
        assert len(found) == len(members)
        return found, {name: archive.extractfile(member).read() for name, member in found.items() if member.isreg()}


def test_a_layer_holds_the_files_and_their_folders(tmp_path):
    layer = FilesLayer.of(make(tmp_path, MODEL, programs=("app/client/app.py",)))
    members, contents = unpacked(layer)
    assert contents == MODEL
    folders = [name for name, member in members.items() if member.isdir()]
    assert folders == ["app", "app/client", "app/mymodel", "app/mymodel/data"]
    modes = {name: member.mode for name, member in members.items()}
    assert {modes.pop(name) for name in [*folders, "app/client/app.py"]} == {0o755}
    assert set(modes.values()) == {0o644}
    assert {(member.uid, member.gid, member.uname, member.mtime) for member in members.values()} == {(0, 0, "", MTIME)}
    names = list(members)
    assert all(names.index(str(Path(name).parent)) < names.index(name) for name in names if "/" in name)


def test_its_digests_are_those_of_the_blob_and_of_the_archive(tmp_path):
    layer = FilesLayer.of(make(tmp_path, MODEL))
    blob = b"".join(layer.stream())
    archive = gzip.decompress(blob)
    assert layer.digest == layer.layer.digest == Digest.of(blob)
    assert layer.layer.diff_id == Digest.of(archive)
    assert (layer.size, layer.layer.size, layer.layer.uncompressed) == (len(blob), len(blob), len(archive))
    assert layer.layer.descriptor.media_type == f"{OCI_LAYER}+gzip"
    assert b"".join(verified(layer)) == blob
    assert [entry.path for entry in layer.entries] == sorted(MODEL)


def test_a_layer_does_not_depend_on_folders_times_modes_or_order(tmp_path):
    first = FilesLayer.of(make(tmp_path / "a", MODEL))
    other = make(tmp_path / "b", dict(reversed(MODEL.items())))
    for number, entry in enumerate(other):
        entry.source.chmod(0o700 + number % 2 * 0o044)
        os.utime(entry.source, (1_000_000 + number, 2_000_000 + number))
    assert FilesLayer.of(reversed(other)).layer == first.layer


@pytest.mark.parametrize("what", ["content", "name", "program"])
def test_another_content_name_or_mode_gives_another_layer(tmp_path, what):
    files = dict(MODEL)
    first = FilesLayer.of(make(tmp_path / "a", files))
    if what == "content":
        files["top.txt"] = b"toq"
    elif what == "name":
        files["tip.txt"] = files.pop("top.txt")
    other = FilesLayer.of(make(tmp_path / "b", files, programs=("top.txt",) if what == "program" else ()))
    assert other.digest != first.digest


@pytest.mark.parametrize(
    "path",
    [
        "n" * 100,
        "n" * 101,
        "n" * 255,
        "/".join(["f" * 120] * 2 + ["n" * 100]),
        "/".join(["folder" * 30] * 5 + ["n" * 200]),
        "modèle/weights-重み.bin",
        "é" * 127,
        "a b/c\td\\e'$x",
    ],
)
def test_names_that_need_a_pax_header(tmp_path, path):
    _, contents = unpacked(FilesLayer.of([one(tmp_path, b"x", path)]))
    assert contents == {path: b"x"}


@pytest.mark.parametrize("size", [(8 << 30) - 1, 8 << 30, 300 << 30])
def test_a_file_of_eight_gibibytes_has_a_header_that_says_so(size):
    with tarfile.open(fileobj=io.BytesIO(file_header("a", size) + END), mode="r|") as archive:
        assert archive.next().size == size


def test_a_large_file_is_never_in_memory(tmp_path):
    source = tmp_path / "sparse"
    size = 300 << 20
    with source.open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        layer = FilesLayer.of([FileEntry(path="app/sparse", source=source, size=size)])
        check(layer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert layer.layer.uncompressed == 512 * 2 + size + 1024
    assert layer.size < 1.001 * size
    assert peak < 12 << 20


def test_many_small_files_are_streamed_in_chunks_worth_sending(tmp_path):
    layer = FilesLayer.of(make(tmp_path, {f"folder/{n}": b"x" * 100 for n in range(2000)}))
    sizes = [len(chunk) for chunk in layer.stream()]
    assert len(sizes) == 8
    assert all(size >= 256 << 10 for size in sizes[:-1])


def test_the_same_layer_is_uploaded_once(registry, tmp_path):
    repository = Repository(registry.host, f"files/{uuid.uuid4().hex}")
    with Registries(Credentials()) as registries:
        pushed = registries.for_host(registry.host)
        layer = FilesLayer.of(make(tmp_path / "a", MODEL))
        assert pushed.push_blob(repository, layer) == layer.size
        again = FilesLayer.of(make(tmp_path / "b", MODEL))
        assert pushed.push_blob(repository, again) == 0
    name = layer.digest.hex
    kept = registry.storage / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"
    assert kept.read_bytes() == b"".join(layer.stream())


# ---- files that are not what they should be


def test_a_layer_without_files_is_refused():
    assert split([], most=0) == []
    with pytest.raises(ValueError, match="no files"):
        FilesLayer.of([])


def a_link(entry: FileEntry) -> None:
    kept = entry.source.rename(entry.source.with_name("kept"))
    entry.source.symlink_to(kept)


def a_linked_folder(entry: FileEntry) -> None:
    kept = entry.source.parent.rename(entry.source.parent.with_name("kept"))
    entry.source.parent.symlink_to(kept)


def a_fifo(entry: FileEntry) -> None:
    entry.source.unlink()
    os.mkfifo(entry.source)


def a_folder(entry: FileEntry) -> None:
    entry.source.unlink()
    entry.source.mkdir()


REPLACED = [a_link, a_linked_folder, a_fifo, a_folder, lambda entry: entry.source.unlink()]


@pytest.mark.parametrize("replace", REPLACED, ids=["link", "folder is a link", "fifo", "folder", "missing"])
def test_a_link_fifo_folder_or_missing_file_is_refused(tmp_path, replace):
    entry = one(tmp_path, path="app/the file")
    layer = FilesLayer.of([entry])
    replace(entry)
    with pytest.raises(InvalidVersion, match=r"'app/the file' cannot be put into a layer: .*regular file"):
        FilesLayer.of([entry])
    with pytest.raises(TryAgain, match="'app/the file' of 7 bytes has changed"):
        list(layer.stream())


def test_an_unreadable_file_is_refused(tmp_path):
    entry = one(tmp_path)
    entry.source.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(InvalidVersion, match=r"Permission denied.*may read"):
            FilesLayer.of([entry])
    finally:
        if root:
            os.seteuid(0)


def test_a_file_that_cannot_be_read_to_its_end_is_refused():
    memory = Path("/proc") / str(os.getpid()) / "mem"  # a regular file by its mode, with nothing at its beginning
    with pytest.raises(InvalidVersion, match="'a' cannot be put into a layer: Input/output error"):
        FilesLayer.of([FileEntry(path="a", source=memory, size=0)])


@pytest.mark.parametrize("size", [6, 8])
def test_a_file_of_another_size_than_was_said_is_refused(tmp_path, size):
    entry = one(tmp_path)
    with pytest.raises(TryAgain, match=f"'a' of {size} bytes has changed"):
        FilesLayer.of([FileEntry(path="a", source=entry.source, size=size)])


@pytest.mark.parametrize("content", [b"conten", b"content.", b"CONTENT", b""])
def test_a_file_that_changes_after_it_was_hashed_is_found(tmp_path, content):
    entry = one(tmp_path)
    layer = FilesLayer.of([entry])
    entry.source.write_bytes(content)
    os.utime(entry.source, (1, 1))
    with pytest.raises(TryAgain, match=r"'a' of 7 bytes has changed .*publish again"):
        list(layer.stream())


@pytest.mark.parametrize("size", [1 << 20, 5 << 20])
def test_a_file_that_shrinks_or_grows_while_it_is_sent_is_found(tmp_path, size):
    entry = one(tmp_path, bytes(4 << 20))
    layer = FilesLayer.of([entry])
    stream = layer.stream()
    next(stream)
    os.truncate(entry.source, size)
    with pytest.raises(TryAgain, match="has changed"):
        list(stream)


def test_a_change_that_hides_its_time_is_found_by_the_digest(tmp_path):
    entry = one(tmp_path)
    layer = FilesLayer.of([entry])
    status = entry.source.stat()
    entry.source.write_bytes(b"CONTENT")
    os.utime(entry.source, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BuildFailed, match="does not match its digest"):
        check(layer)


WRONG_PATHS = {
    "": "relative",
    "/a": "relative",
    "a/": "relative",
    "a//b": "relative",
    "../a": "relative",
    "a/./b": "relative",
    "a/../b": "relative",
    "a\0b": "relative",
    ".wh.a": "deletes",
    "a/.wh..wh..opq": "deletes",
    "a/.wh.b/c": "deletes",
    "n" * 256: "255 bytes",
    "é" * 128: "255 bytes",
    "a\udc80": "UTF-8",
}


@pytest.mark.parametrize("path", WRONG_PATHS)
def test_paths_that_no_layer_may_have(tmp_path, path):
    entry = FileEntry(path=path, source=one(tmp_path).source, size=7)
    for make_layers in (lambda: FilesLayer.of([entry]), lambda: split([entry], most=3)):
        with pytest.raises(InvalidVersion, match=f"is not allowed in an image.*{WRONG_PATHS[path]}") as caught:
            make_layers()
        caught.value.one_line().encode()


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (["a", "b", "a"], "Two files have the path 'a'"),
        (["a/b", "a"], "'a' is a file in the image, and also the folder of 'a/b'"),
        (["a/b", "a/b.c", "a/b/c/d"], "'a/b' is a file in the image, and also the folder of 'a/b/c/d'"),
        (["a", "a!", "a/b"], "'a' is a file"),
    ],
)
def test_two_files_at_one_path_are_refused(paths, why):
    entries = [nowhere(path, LARGE) for path in paths]
    for make_layers in (lambda: FilesLayer.of(entries), lambda: split(entries, most=9)):
        with pytest.raises(InvalidVersion, match=why):
            make_layers()


# ---- groups

SIZES = st.one_of(
    st.integers(0, LARGE), st.integers(LARGE - 1, LARGE + 1), st.integers(0, 2 * BUCKET), st.sampled_from([20 << 30])
)
ENTRIES = st.dictionaries(st.text("abcé/", min_size=1, max_size=6), SIZES, max_size=60).map(
    # A file's name never names a folder.
    lambda files: [
        nowhere("/".join([*(f"d{part}" for part in path.split("/")), f"f{number}"]), size)
        for number, (path, size) in enumerate(files.items())
    ]
)


FOLDERS = st.lists(ENTRIES, min_size=1, max_size=2).map(
    lambda folders: [
        [nowhere(f"{number}/{entry.path}", entry.size) for entry in folder] for number, folder in enumerate(folders)
    ]
)


def sent(group):
    return sum(entry.size for entry in group)


def in_common(before, after):
    return len({*before} & {*after})


@given(FOLDERS, st.integers(1, 40), st.randoms())
def test_every_file_is_in_one_group_whatever_the_order(folders, most, shuffler):
    groups = split(*folders, most=most)
    paths = sorted(entry.path for folder in folders for entry in folder)
    assert sorted(entry.path for group in groups for entry in group) == paths
    assert len(groups) <= most
    assert all(groups)
    for folder in folders:
        shuffler.shuffle(folder)
    assert split(*map(iter, folders), most=most) == groups


@given(FOLDERS)
def test_where_there_are_layers_large_files_are_alone_and_small_ones_by_their_folders(folders):
    groups = split(*folders, most=200)
    for group in groups:
        assert len(group) == 1 or all(entry.size < LARGE for entry in group)
        assert len({entry.path[0] for entry in group}) == 1
    for folder in folders:
        small = [entry for entry in folder if entry.size < LARGE]
        if small and sent(small) <= BUCKET:
            assert tuple(sorted(small, key=lambda entry: entry.path)) in groups


@given(FOLDERS, st.integers(4, 40))
def test_small_files_stand_apart_however_few_the_layers(folders, most):
    for group in split(*folders, most=most):
        assert len({(entry.path[0], entry.size < LARGE) for entry in group}) == 1


@given(ENTRIES, st.integers(1, 40), st.data())
def test_a_file_that_changes_keeps_its_group(entries, most, data):
    if not entries:
        return
    changed = data.draw(st.sampled_from(entries))
    touched = FileEntry(path=changed.path, source=Path("/elsewhere/f"), size=changed.size)
    before, after = split(entries, most=most), split([e for e in entries if e is not changed] + [touched], most=most)
    differ = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(differ) == 1
    assert changed in differ[0][0]


@given(FOLDERS, st.integers(1, 40))
def test_a_layer_less_joins_two(folders, most):
    before, after = split(*folders, most=most + 1), split(*folders, most=most)
    assert len(before) - in_common(before, after) in {0, 2}
    assert len(after) - in_common(before, after) in {0, 1}


@pytest.mark.parametrize("seed", range(20))
def test_a_file_more_changes_few_groups(seed):
    chance = random.Random(seed)
    files = [nowhere(f"{seed}/{number}", (100 << 20) + chance.randrange(1000)) for number in range(200)]
    before, after = split(files, most=50), split([*files, nowhere("more", 100 << 20)], most=50)
    assert 1 <= len(after) - in_common(before, after) <= 3
    # Four files are in a layer on average.
    assert max(map(len, before)) <= 8


@pytest.mark.parametrize("most", [24, 32, 42, 75])
def test_of_a_model_in_shards_what_changes_is_sent_alone(most):
    """As of the models that MLflow's users have: 4 GB, and each version has another head."""
    shards = [nowhere(f"app/mymodel/weights-{number}.bin", 100 << 20) for number in range(40)]
    head, description = nowhere("app/mymodel/head.bin", 1 << 20), nowhere("app/mymodel/MLmodel", 500)
    client = nowhere("app/client/app.py", 500)
    groups = split([*shards, head, description], [client], most=most)
    assert groups[-3:] == [(head,), (client,), (description,)]
    assert len(groups) == min(most, 43)
    assert max(map(len, groups)) <= {24: 3, 32: 2, 42: 2, 75: 1}[most]


def test_files_of_about_one_size_do_not_change_places_for_a_few_bytes():
    def shards(seed):
        chance = random.Random(seed)
        return [nowhere(f"{number}", (100 << 20) + chance.randrange(10_000)) for number in range(40)]

    one, other = ([[entry.path for entry in group] for group in split(shards(seed), most=23)] for seed in (1, 2))
    assert one == other


def test_large_files_come_first_and_small_ones_last():
    entries = [nowhere("z", LARGE), nowhere("b", LARGE - 1), nowhere("a", 1), nowhere("y", LARGE + 1)]
    entries.append(nowhere("zz", 100 << 20))
    names = [[entry.path for entry in group] for group in split(entries, most=9)]
    assert names == [["zz"], ["y"], ["z"], ["a", "b"]]
    assert [[entry.path for entry in group] for group in split(entries, most=3)] == [["zz"], ["y", "z"], ["a", "b"]]
    assert [[entry.path for entry in group] for group in split(entries, most=2)] == [["y", "z", "zz"], ["a", "b"]]
    assert [[entry.path for entry in group] for group in split(entries, most=1)] == [["a", "b", "y", "z", "zz"]]
    with pytest.raises(InvalidVersion, match=r"5 files, 'a' the first.*fewer layers"):
        split(entries, most=0)


def test_many_small_files_are_divided_by_their_paths():
    def files(count: int) -> list[FileEntry]:
        return [nowhere(f"shard/{number}", 200_000) for number in range(count)]

    assert len(split(files(167), most=40)) == 1
    groups = split(files(1100), most=40)
    assert max(map(sent, groups)) <= BUCKET
    assert len(groups) < 3 * sent(files(1100)) / BUCKET
    assert len(split(files(1100), most=5)) == 5
    # Another file is put into one of them; the others stay.
    more = split(files(1101), most=40)
    assert len(more) - in_common(groups, more) == 1


def test_many_small_files_leave_layers_to_the_large_ones():
    small = [nowhere(f"a/{number}", 200_000) for number in range(10_000)]
    large = [nowhere(f"b/{number}", 100 << 20) for number in range(20)]
    assert max(map(sent, split([*small, *large], most=24))) < 400 << 20


# ---- the most bytes of a layer

GB = 10**9


@pytest.mark.parametrize("most", [15, 16, 20, 24, 75])
def test_no_layer_is_too_large_where_there_is_room(most):
    """Two of them fit into a layer."""
    shards = [nowhere(f"{number}.bin", 49 * GB // 10) for number in range(30)]
    groups = split(shards, [nowhere("MLmodel", 500)], most=most + 1, limit=10 * GB)
    assert max(map(len, groups)) == (1 if most >= 30 else 2)
    assert len(groups) == min(most, 30) + 1


@given(ENTRIES, st.integers(1, 10), st.integers(1 << 20, 8 * BUCKET))
def test_every_layer_is_below_the_limit_or_the_files_are_refused(entries, most, limit):
    try:
        groups = split(entries, most=most, limit=limit)
    except InvalidVersion:
        # At least half of each layer was filled then, headers included; or a file alone is too much.
        overhead = 100_000 * len(entries)
        assert max(entry.size for entry in entries) * 1.001 > limit or sent(entries) + overhead > most * limit / 2
    else:
        assert all(sent(group) < limit for group in groups)


def test_files_that_do_not_fit_are_refused():
    with pytest.raises(InvalidVersion, match=r"'b' of 10000000000 bytes .* less than 10000000000 bytes\. .*in shards"):
        split([nowhere("a", 1), nowhere("b", 10 * GB)], most=9, limit=10 * GB)
    shards = [nowhere(f"{number}", 6 * GB) for number in range(10)]
    with pytest.raises(InvalidVersion, match=r"10 files of 60000000000 bytes do not fit into 9 layers.*smaller shards"):
        split(shards, most=9, limit=10 * GB)


@pytest.mark.parametrize("path", ["a", "é", "modèle-重み/" * 30 + "n" * 200, "/".join("d" * 200)])
@pytest.mark.parametrize("size", [0, 1, 70_000, 3 << 20])
def test_a_layer_is_no_larger_than_it_was_reckoned(tmp_path, path, size):
    entry = one(tmp_path, random.Random(size).randbytes(size), path)
    layer = FilesLayer.of([entry])
    assert split([entry], most=1, limit=2 * layer.size + 5_000_000)
    with pytest.raises(InvalidVersion, match="cannot be in a layer"):
        split([entry], most=1, limit=layer.size)

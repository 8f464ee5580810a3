"""Layers of locked wheels: from a real index into a real registry."""

from __future__ import annotations

import hashlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builder.clients import Registries
from builder.errors import BuilderError, PermissionRefused
from builder.oci.registry import RemoteBlob
from builder.oci.store import LayerStore
from builder.package_index import Indexes, IndexUrl
from builder.package_index.client import IndexClient
from builder.package_index.wheel_file import LockedWheel
from builder.reference import Repository
from builder.wheels.layer_cache import ByteSemaphore, Group, WheelLayers
from tests.package_index.server import running
from tests.wheels.made import INFO, NAME, PYTHON, compiler, make, put, unpacked
from tests.wheels.made import central as central_entry
from tests.wheels.made import local as local_header


@pytest.fixture
def index():
    with running() as found:
        for number in range(4):
            module = {f"pack_{number}/__init__.py": f"NUMBER = {number}\n".encode() * 100}
            found.add(f"pack-{number}", "1.0", files=module)
        yield found


@pytest.fixture
def store(registry):
    with Registries() as registries:
        yield LayerStore(registries.for_host(registry.host), Repository(registry.host, f"layers/{uuid.uuid4().hex}"))


def locked(index, name, version="1.0", **changes):
    ((filename, (content, *_)),) = index.files[name].items()
    fields = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), **changes}
    return LockedWheel(name=name, version=version, filename=filename, **fields)


def make_layers(index, store, folder, *, bytecode=False):
    client = IndexClient(Indexes(default=IndexUrl(index.simple, *(index.credential or ()))))
    layers = WheelLayers(store, client, python=PYTHON, compiler=compiler() if bytecode else None, folder=folder)
    return client, layers


def groups_of(index):
    one, two, three, four = (locked(index, f"pack-{number}") for number in range(4))
    return [Group((one,)), Group((two,)), Group((three, four))]


def place(index, store, folder, groups, repository=None, **options):
    client, layers = make_layers(index, store, folder, **options)
    with client, layers:
        return layers.placed(groups, repository), layers.transfers


def downloads(index):
    return [path for method, path, _ in index.requests if path.startswith("/files/")]


def test_missing_layers_are_made_and_known_ones_are_not_downloaded(index, store, tmp_path):
    groups = groups_of(index)
    target = Repository(store.repository.host, f"{store.repository.path}-image")
    made, traffic = place(index, store, tmp_path, groups, target, bytecode=True)
    assert set(made) == {group.source for group in groups}
    assert (traffic.known, traffic.made) == (0, 3)
    assert traffic.sent == sum(layer.size for layer in made.values())
    assert all(store.registry.has_blob(target, layer.digest) for layer in made.values())
    assert list(tmp_path.iterdir()) == []

    before = len(index.requests)
    other = Repository(store.repository.host, f"{store.repository.path}-other")
    known, traffic = place(index, store, tmp_path, [*groups, groups[0]], other, bytecode=True)
    assert known == made
    assert (traffic.known, traffic.made, traffic.received, traffic.sent) == (3, 0, 0, 0)
    assert len(index.requests) == before
    assert all(store.registry.has_blob(other, layer.digest) for layer in made.values())


def test_layers_with_and_without_bytecode_have_different_keys(index, store, tmp_path):
    groups = groups_of(index)
    plain, _ = place(index, store, tmp_path, groups)
    compiled, traffic = place(index, store, tmp_path, groups, bytecode=True)
    assert traffic.made == 3
    assert not {layer.digest for layer in plain.values()} & {layer.digest for layer in compiled.values()}


def test_verify_compares_new_layers_with_cached_ones(index, store, tmp_path):
    groups = groups_of(index)
    client, layers = make_layers(index, store, tmp_path, bytecode=True)
    with client, layers:
        assert {verdict.state for _, verdict in layers.verified(groups)} == {"missing"}
        assert downloads(index) == []
        made = layers.placed(groups, None)
        assert {group: verdict.state for group, verdict in layers.verified(groups)} == dict.fromkeys(groups, "same")
        # A true layer, of another wheel, under this one's name.
        other = made[groups[1].source]
        blob = RemoteBlob(registry=store.registry, repository=store.repository, descriptor=other.descriptor)
        store.keep(layers.key(groups[0]), other, blob, source=groups[0].source, title="forged")
        wrong = dict(layers.verified(groups))
        assert (wrong[groups[0]].state, str(other.digest) in str(wrong[groups[0]])) == ("different", True)
        assert {wrong[group].state for group in groups[1:]} == {"same"}


def test_the_last_wheel_with_a_file_wins_however_wheels_are_grouped(index, store, tmp_path):
    for name in ("twin-a", "twin-b"):
        index.add(name, "1.0", files={"twin/__init__.py": f"WHO = {name!r}\n".encode()})
    one, other = locked(index, "twin-a"), locked(index, "twin-b")
    groups = [Group((one,)), Group((other,)), Group((one, other))]
    made, _ = place(index, store, tmp_path, groups, bytecode=True)
    content = {
        group: unpacked(store.registry.blob_bytes(store.repository, made[group.source].descriptor, 1 << 20))
        for group in groups
    }
    # Of two layers, what the upper one has is seen.
    stacked = content[groups[0]] | content[groups[1]]
    assert {path: found[1] for path, found in stacked.items() if "/twin/" in path} == {
        path: found[1] for path, found in content[groups[2]].items() if "/twin/" in path
    }


def test_only_the_lost_layer_is_made_again(index, store, tmp_path):
    groups = groups_of(index)
    made, _ = place(index, store, tmp_path, groups)
    lost = made[groups[1].source]
    path = f"/v2/{store.repository.path}/blobs/{lost.digest}"
    assert store.registry._transport.send("DELETE", path, until=float("inf"), scopes=frozenset()).status == 202
    before = len(downloads(index))
    again, traffic = place(index, store, tmp_path, groups)
    assert again == made
    assert (traffic.known, traffic.made) == (2, 1)
    assert {path.rpartition("/")[2] for path in downloads(index)[before:]} == {groups[1].wheels[0].filename}
    assert store.registry.has_blob(store.repository, lost.digest)


def test_a_private_index_gets_its_credential(index, store, tmp_path):
    index.credential = ("reader", "s3cret")
    made, _ = place(index, store, tmp_path, groups_of(index))
    assert len(made) == 3
    client, layers = make_layers(index, store, tmp_path, bytecode=True)
    index.credential = ("reader", "changed")
    with client, layers, pytest.raises(PermissionRefused) as caught:
        layers.placed(groups_of(index), None)
    assert "s3cret" not in str(caught.value)


def test_a_wheel_with_another_hash_than_the_lock_is_refused_and_not_cached(index, store, tmp_path):
    group = Group((locked(index, "pack-0", sha256="0" * 64),))
    with pytest.raises(BuilderError, match=r"pack_0-1\.0") as caught:
        place(index, store, tmp_path, [group])
    assert caught.value.exit_code != 70
    client, layers = make_layers(index, store, tmp_path)
    with client, layers:
        assert layers.known([group]) == {}
    assert list(tmp_path.iterdir()) == []


def renamed(name):
    """Give a member another name of the same length, in both places that name it."""

    def patch(data):
        for find, size in ((central_entry, 46), (local_header, 30)):
            offset = find(data, "demo/placeholder.py") + size
            data[offset : offset + len(name)] = name.encode()

    return patch


HOSTILE = {
    "above": {"files": {"demo/placeholder.py": b""}, "patch": renamed("../../../etc/passwd")},
    "absolute": {"files": {"demo/placeholder.py": b""}, "patch": renamed("/etc/cron.d/abcdefg")},
    "a link": {"files": {"demo/link": b"/etc/passwd"}, "modes": {"demo/link": 0o120777}},
    "a lie about a size": {
        "files": {"demo/x.py": b"x" * 1000},
        "patch": lambda data: put(data, central_entry(data, "demo/x.py") + 24, "I", 5),
    },
    "a bad checksum": {
        "files": {"demo/x.py": b"x" * 1000},
        "patch": lambda data: put(data, central_entry(data, "demo/x.py") + 16, "I", 5),
    },
    "no metadata": {"files": {f"{INFO}/METADATA": None}},
    "no archive": {"patch": lambda _data: b"PK nothing"},
    "nothing": {"patch": lambda _data: bytearray(b"\n")},
}


@pytest.mark.parametrize("options", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_wheel_is_refused_by_name_and_leaves_nothing(index, store, tmp_path, options):
    path = make(tmp_path / "made", **options)
    index.files["demo"] = {NAME: (path.read_bytes(), "2020-01-01T00:00:00Z", False)}
    folder = tmp_path / "scratch"
    folder.mkdir()
    group = Group((locked(index, "demo"),))
    with pytest.raises(BuilderError) as caught:
        place(index, store, folder, [group, *groups_of(index)], bytecode=True)
    assert caught.value.exit_code == 65
    assert NAME in str(caught.value)
    assert list(folder.iterdir()) == []
    client, layers = make_layers(index, store, folder, bytecode=True)
    with client, layers:
        assert group not in layers.known([group])


def test_a_wheel_whose_record_misstates_a_file_is_named_in_a_warning(index, store, tmp_path, caplog):
    path = make(tmp_path / "made", rows=lambda rows: rows.update({f"{INFO}/METADATA": ("sha256=" + "A" * 43, "1")}))
    index.files["demo"] = {NAME: (path.read_bytes(), "2020-01-01T00:00:00Z", False)}
    groups = [Group((locked(index, "pack-0"), locked(index, "demo"))), *groups_of(index)[1:]]
    made, _ = place(index, store, tmp_path, groups)
    assert set(made) == {group.source for group in groups}
    (line,) = (record.msg for record in caplog.records if "RECORD" in str(record.msg))
    assert (line["level"], line["wheel"], line["files"]) == ("warning", NAME, f"{INFO}/METADATA")


def test_a_full_disk_is_reported_with_a_remedy(index, store):
    full = Path("/dev/full")
    client, layers = make_layers(index, store, None)
    with client, layers:
        original = layers._temporary.name
        with pytest.MonkeyPatch.context() as patch:
            real = Path.open

            def opened(self, mode="r", *arguments, **options):
                return real(
                    full if self.name == "layer.tar.gz" else self, "wb" if mode == "xb" else mode, *arguments, **options
                )

            patch.setattr(Path, "open", opened)
            with pytest.raises(BuilderError, match="cannot be written: No space left") as caught:
                layers.placed(groups_of(index)[:1], None)
        assert caught.value.exit_code == 75
        assert "TMPDIR" in caught.value.remedy
    assert not Path(original).exists()


def test_the_byte_semaphore_bounds_threads_and_lets_a_larger_request_run_alone():
    semaphore, lock, used, most, alone = ByteSemaphore(10), threading.Lock(), [], [], []

    def work(size):
        with semaphore.acquired(size):
            with lock:
                used.append(size)
                most.append(sum(used))
            threading.Event().wait(0.01)
            with lock:
                if size > 10:
                    # A thread that needs no bytes may be at work beside it.
                    alone.append([each for each in used if each])
                used.remove(size)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, [25, 9, 8, 1, 1, 1, 5, 5, 0, 0, 25, 3, 3, 3, 3]))
    assert alone == [[25], [25]]
    assert max(total for total in most if total != 25) <= 10
    assert max(most) == 25

"""Layouts that a hostile process wrote."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import safe_open
from builder.errors import BuildFailed
from builder.oci import LayoutBlob, check, verified
from builder.oci.manifest import open_layout
from builder.reference import Digest, Platform
from scripts.base_image import base_image as make_base_image
from tests.oci.layouts import CONFIG, INDEX, LAYER, Layout, make_layout, sha256, tar
from tests.waiting import HANG

AMD64 = Platform("linux", "amd64")
ARM64 = Platform("linux", "arm64")
SECRET = "the-secret-of-another-folder"


def replaced(path: Path, by: Callable[[Path], None]) -> None:
    """Put something else where a file was, and keep the file beside it."""
    path.rename(path.with_name(f"{path.name}.kept"))
    by(path)


def link(path: Path) -> None:
    path.symlink_to(f"{path.name}.kept")


def layer(layout: Layout, number: int = 0) -> Path:
    return layout.path(layout.manifest()["layers"][number])


def config(layout: Layout) -> Path:
    return layout.path(layout.manifest()["config"])


def linked_folder(layout: Layout, name: str) -> None:
    replaced(layout.folder / name, link)


def with_index(change: Callable[[dict], object]) -> Callable[[Layout], None]:
    def spoil(layout: Layout) -> None:
        path = layout.folder / "index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return spoil


def with_manifest(**fields: object) -> Callable[[Layout], None]:
    return lambda layout: layout.index(layout.image(**fields))


def with_layer(**fields: object) -> Callable[[Layout], None]:
    def spoil(layout: Layout) -> None:
        layers = layout.manifest()["layers"]
        layers[0].update(fields)
        layout.index(layout.image(layers=layers))

    return spoil


def with_config(content: object) -> Callable[[Layout], None]:
    def spoil(layout: Layout) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        layout.index(layout.image(config=layout.blob(data, CONFIG)))

    return spoil


def two_images(layout: Layout) -> None:
    layout.index(layout.image(), layout.image(annotations={"another": "one"}))


def one_for_each_platform(layout: Layout) -> None:
    own = {**layout.image(), "platform": {"os": "linux", "architecture": "amd64"}}
    layout.index(own, {**layout.image(annotations={"a": "b"}), "platform": {"os": "linux", "architecture": "arm64"}})


def nested(depth: int, count: int = 1) -> Callable[[Layout], None]:
    def spoil(layout: Layout) -> None:
        entries = [layout.image(annotations={"number": str(n)}) for n in range(count)]
        for _ in range(depth):
            entries = [layout.json_blob({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}, INDEX)]
        layout.index(*entries)

    return spoil


def sized_wrongly(layout: Layout) -> None:
    manifest = layout.manifest()
    twice = {**manifest["layers"][0], "size": manifest["layers"][0]["size"] + 1}
    layout.index(layout.image(layers=[manifest["layers"][0], twice]))


def sparse(layout: Layout) -> None:
    path = layer(layout)
    os.truncate(path, 1 << 40)
    with_layer(size=1 << 40)(layout)


HOSTILE: dict[str, tuple[Callable[[Layout], object], str]] = {
    "no folder": (lambda made: made.folder.rename(made.folder.with_name("away")), "layout cannot be opened"),
    "folder is a link": (lambda made: replaced(made.folder, link), "layout cannot be opened"),
    "folder is a file": (lambda made: replaced(made.folder, lambda path: path.write_text("x")), "cannot be opened"),
    "no oci-layout": (lambda made: (made.folder / "oci-layout").unlink(), "oci-layout cannot be opened"),
    "oci-layout of another version": (
        lambda made: (made.folder / "oci-layout").write_text('{"imageLayoutVersion": "2"}'),
        "unknown version",
    ),
    "oci-layout is huge": (lambda made: (made.folder / "oci-layout").write_text(" " * 5000), "larger than"),
    "index is a link": (lambda made: replaced(made.folder / "index.json", link), "index.json is not a regular file"),
    "index is a link to a secret": (
        lambda made: replaced(made.folder / "index.json", lambda path: path.symlink_to("../secret")),
        "index.json is not a regular file",
    ),
    "index is a hard link to a secret": (
        lambda made: replaced(made.folder / "index.json", lambda path: path.hardlink_to(made.folder / "../secret")),
        "it is not JSON",
    ),
    "index is a FIFO": (lambda made: replaced(made.folder / "index.json", os.mkfifo), "not a regular file"),
    "index is a folder": (lambda made: replaced(made.folder / "index.json", Path.mkdir), "not a regular file"),
    "index is huge": (lambda made: os.truncate(made.folder / "index.json", 1 << 40), "larger than"),
    "index is not JSON": (lambda made: (made.folder / "index.json").write_bytes(b"\xff\x00"), "not JSON"),
    "index is deep": (lambda made: (made.folder / "index.json").write_text("[" * 200_000), "not JSON"),
    "index is a list": (lambda made: (made.folder / "index.json").write_text("[]"), "not an object"),
    "index holds NaN": (lambda made: (made.folder / "index.json").write_text('{"manifests": NaN}'), "not JSON"),
    "no image": (lambda made: made.index(), "holds 0"),
    "two images": (two_images, "holds 2"),
    "an image for each platform": (one_for_each_platform, "holds 2"),
    "nested index of two": (nested(1, 2), "holds 2"),
    "index in an index in an index": (nested(2), "an index within an index"),
    "an artifact": (with_index(lambda index: index["manifests"][0].update(mediaType="a/b")), "not an image"),
    "manifest without a digest": (with_index(lambda index: index["manifests"][0].pop("digest")), "a digest"),
    "digest with dots": (
        with_index(lambda index: index["manifests"][0].update(digest="sha256:../../../secret")),
        "a digest",
    ),
    "digest of another hash": (with_index(lambda index: index["manifests"][0].update(digest="sha512:00")), "a digest"),
    "digest of a list": (with_index(lambda index: index["manifests"][0].update(digest=["x"])), "a digest"),
    "digest of other content": (
        with_index(lambda index: index["manifests"][0].update(digest=sha256(b"x"))),
        "cannot be opened",
    ),
    "size of true": (with_index(lambda index: index["manifests"][0].update(size=True)), "valid size"),
    "size below zero": (with_index(lambda index: index["manifests"][0].update(size=-1)), "valid size"),
    "size of a huge manifest": (with_index(lambda index: index["manifests"][0].update(size=1 << 40)), "larger than"),
    "size of an endless number": (
        lambda made: (made.folder / "index.json").write_text(f'{{"manifests": [{{"size": {"9" * 5000}}}]}}'),
        "not JSON",
    ),
    "size less than it is": (
        with_index(lambda index: index["manifests"][0].update(size=index["manifests"][0]["size"] - 1)),
        "larger than",
    ),
    "another platform in the index": (
        with_index(lambda index: index["manifests"][0].update(platform={"os": "linux", "architecture": "arm64"})),
        "it is for linux/arm64",
    ),
    "platform with a slash": (
        with_index(lambda index: index["manifests"][0].update(platform={"os": "linux", "architecture": "a/../b"})),
        "not os/architecture",
    ),
    "annotations that are none": (
        with_index(lambda index: index["manifests"][0].update(annotations={"a": 1})),
        "not all strings",
    ),
    "blobs is a link": (lambda made: linked_folder(made, "blobs"), "blobs cannot be opened"),
    "sha256 is a link": (lambda made: linked_folder(made, "blobs/sha256"), "sha256 cannot be opened"),
    "a layer is a link": (lambda made: replaced(layer(made), link), "not a regular file"),
    "a layer is a FIFO": (lambda made: replaced(layer(made), os.mkfifo), "not a regular file"),
    "a layer is a device": (
        lambda made: replaced(layer(made), lambda path: os.mknod(path, 0o020666, os.makedev(1, 5))),
        "not a regular file",
    ),
    "a layer is gone": (lambda made: layer(made).unlink(), "cannot be opened"),
    "a layer holds something else": (
        lambda made: layer(made).write_bytes(bytes(layer(made).stat().st_size)),
        "does not match its digest",
    ),
    "a layer is longer": (lambda made: layer(made).write_bytes(layer(made).read_bytes() + b"x"), "something else"),
    "a layer is shorter": (lambda made: layer(made).write_bytes(layer(made).read_bytes()[:-1]), "something else"),
    "a layer is endless": (sparse, "larger than"),
    "a layer has two sizes": (sized_wrongly, "two sizes"),
    "a foreign layer": (
        with_layer(mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        "media type",
    ),
    "a layer not to be distributed": (
        with_layer(mediaType="application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
        "media type",
    ),
    "a layer from elsewhere": (with_layer(urls=["https://elsewhere.invalid/"]), "other addresses"),
    "a layer of no kind": (with_layer(mediaType="no kind\nat all"), "mediaType"),
    "layers that are no list": (with_manifest(layers={"a": "b"}), "not a list"),
    "more layers than diff ids": (
        with_config({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": []}}),
        "2 layers",
    ),
    "too many layers": (lambda made: made.index(made.image(layers=made.manifest()["layers"] * 600)), "more than"),
    "a manifest that is an index": (with_manifest(mediaType=INDEX), "not the declared one"),
    "a config that is a link": (lambda made: replaced(config(made), link), "not a regular file"),
    "a config of another kind": (
        lambda made: made.index(made.image(config=made.blob(b"{}", "application/json"))),
        "config is not an image's",
    ),
    "a config for another platform": (
        with_config({"os": "linux", "architecture": "arm64", "rootfs": {"diff_ids": [sha256(b""), sha256(b"")]}}),
        "it is for linux/arm64",
    ),
    "a config for a variant": (
        with_config(
            {"os": "linux", "architecture": "amd64", "variant": "v3", "rootfs": {"diff_ids": [sha256(b"")] * 2}}
        ),
        "it is for linux/amd64/v3",
    ),
    "a config without a platform": (with_config({"rootfs": {"diff_ids": [sha256(b"")] * 2}}), "no os"),
    "a config without layers": (with_config({"os": "linux", "architecture": "amd64"}), "rootfs is not an object"),
    "a config with labels that are none": (
        with_config(
            {
                "os": "linux",
                "architecture": "amd64",
                "rootfs": {"diff_ids": [sha256(b"")] * 2},
                "config": {"Labels": {"a": ["b"]}},
            }
        ),
        "labels are not all strings",
    ),
    "a config with an endless number": (with_config(b'{"os": 1e999}'), "not JSON"),
}


@pytest.mark.timeout(HANG)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_layout_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    made = make_layout(tmp_path / "layout")
    spoil, message = HOSTILE[name]
    spoil(made)
    with pytest.raises(BuildFailed, match=message) as caught:
        open_layout(made.folder, AMD64)
    assert SECRET not in caught.value.one_line()
    assert str(tmp_path) not in str(caught.value)


def docker_types(folder: Path) -> Layout:
    return make_layout(
        folder,
        layer_type="application/vnd.docker.image.rootfs.diff.tar.gzip",
        manifest_type="application/vnd.docker.distribution.manifest.v2+json",
        config_type="application/vnd.docker.container.image.v1+json",
    )


def with_attestation(folder: Path) -> Layout:
    layout = make_layout(folder)
    unknown = {"os": "unknown", "architecture": "unknown"}
    statement = {**layout.image(annotations={"a": "statement"}), "platform": unknown}
    layout.index(statement, layout.image())
    return layout


def named_twice(folder: Path) -> Layout:
    layout = make_layout(folder)
    image = layout.image()
    names = [{"org.opencontainers.image.ref.name": name} for name in ("one", "two")]
    layout.index(*({**image, "annotations": name} for name in names))
    return layout


def in_an_index(folder: Path) -> Layout:
    layout = make_layout(folder)
    nested(1)(layout)
    return layout


@pytest.mark.parametrize(
    ("make", "platform"),
    [
        (make_layout, "linux/amd64"),
        (lambda folder: make_layout(folder, index_platform={"os": "linux", "architecture": "amd64"}), "linux/amd64"),
        (lambda folder: make_layout(folder, layer_type=LAYER), "linux/amd64"),
        (lambda folder: make_layout(folder, layers=[]), "linux/amd64"),
        (lambda folder: make_layout(folder, layers=[tar("a", b"b")] * 3), "linux/amd64"),
        (lambda folder: make_layout(folder, architecture="arm", variant="v7"), "linux/arm/v7"),
        (lambda folder: make_layout(folder, architecture="arm"), "linux/arm/v7"),
        (lambda folder: make_layout(folder, architecture="arm"), "linux/arm/v6"),
        (lambda folder: make_layout(folder, architecture="arm64", variant="v8"), "linux/arm64"),
        (docker_types, "linux/amd64"),
        (with_attestation, "linux/amd64"),
        (named_twice, "linux/amd64"),
        (in_an_index, "linux/amd64"),
    ],
)
def test_layouts_of_engines_are_accepted(make, platform: str, tmp_path: Path) -> None:
    image = open_layout(make(tmp_path / "layout").folder, Platform.parse(platform))
    assert image.platform == Platform.parse(platform)
    assert len(image.layers) == len(image.diff_ids)
    assert len(image.blobs()) == len({layer.digest for layer in image.layers})


def test_an_arm_of_another_variant_is_refused(tmp_path: Path) -> None:
    made = make_layout(tmp_path / "layout", architecture="arm", variant="v7")
    with pytest.raises(BuildFailed, match="it is for linux/arm/v7"):
        open_layout(made.folder, Platform.parse("linux/arm/v6"))


def test_a_layout_written_by_skopeo_is_read(tmp_path: Path) -> None:
    base = make_base_image(("linux/amd64", "linux/arm64", "linux/arm/v7"))
    copy = ["skopeo", "--override-arch", "arm64", "copy", "--quiet", f"oci:{base}", f"oci:{tmp_path}/layout:tag"]
    subprocess.run(copy, check=True)
    assert open_layout(tmp_path / "layout", ARM64).layers
    with pytest.raises(BuildFailed, match="it is for linux/arm64"):
        open_layout(tmp_path / "layout", AMD64)


def test_a_file_that_is_swapped_between_look_and_opening(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("x")
    real = os.stat

    def swap(*arguments, **options):
        status = real(*arguments, **options)
        (tmp_path / "file").unlink()
        os.mkfifo(tmp_path / "file")
        return status

    monkeypatch.setattr(os, "stat", swap)
    with pytest.raises(safe_open.Unsafe, match="not a regular file"):
        safe_open.read(tmp_path, "file", limit=10)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../secret", "/etc/passwd", "a\0b"])
def test_a_name_that_is_a_path_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(safe_open.Unsafe):
        safe_open.read(tmp_path, name, limit=10)


@pytest.mark.parametrize("size", [0, 1, safe_open.CHUNK - 1, safe_open.CHUNK, safe_open.CHUNK + 1, 3 * safe_open.CHUNK])
def test_the_last_bytes_are_given_only_when_all_is_right(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    layout = make_layout(tmp_path / "layout")
    layout.blob(content)
    blob = LayoutBlob(layout=layout.folder, digest=Digest.of(content), size=size)
    assert b"".join(verified(blob)) == content
    if size:
        spoilt = content[:-1] + bytes([content[-1] ^ 1])
        (layout.folder / "blobs/sha256" / blob.digest.hex).write_bytes(spoilt)
        given: list[bytes] = []
        with pytest.raises(BuildFailed):
            given.extend(verified(blob))
        assert len(b"".join(given)) < size


@pytest.mark.parametrize("last", [True, False])
def test_check_reads_to_the_end(last: bool, tmp_path: Path) -> None:
    content = os.urandom(2 * safe_open.CHUNK + 1)
    layout = make_layout(tmp_path / "layout")
    layout.blob(content)
    blob = LayoutBlob(layout=layout.folder, digest=Digest.of(content), size=len(content))
    check(blob)
    changed = content[:-1] + bytes([content[-1] ^ 1]) if last else bytes([content[0] ^ 1]) + content[1:]
    (layout.folder / "blobs/sha256" / blob.digest.hex).write_bytes(changed)
    with pytest.raises(BuildFailed, match="does not match its digest"):
        check(blob)

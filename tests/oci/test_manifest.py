from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.oci import (
    DOCKER_MANIFEST,
    MANIFESTS,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    Malformed,
    from_bytes,
    to_bytes,
)
from builder.oci.manifest import (
    PREFIX,
    SOURCE_ID,
    finished_image,
    images_of,
    index,
    media_type_of,
    open_layout,
    read_config,
    read_published,
    timestamp,
)
from builder.reference import Digest, Platform
from tests.oci.layouts import make_layout

AMD64, ARM = Platform("linux", "amd64"), Platform("linux", "arm", "v7")
CREATED = datetime(2024, 5, 6, 7, 8, 9, 123000, tzinfo=UTC)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def finished(folder: Path, **options):
    labels = {SOURCE_ID: "ours", "plain": "ours too"}
    platform = Platform.parse(f"linux/{options.get('architecture', 'amd64')}")
    return finished_image(
        open_layout(make_layout(folder, **options).folder, platform),
        labels=labels,
        annotations={SOURCE_ID: "ours"},
        created=CREATED,
    )


def test_our_labels_win_and_the_rest_of_the_config_stays(tmp_path: Path) -> None:
    runtime = {
        "Cmd": ["python", "-m", "x"],
        "User": "1000",
        "Labels": {"theirs": "stays", "plain": "theirs", SOURCE_ID: "a lie", f"{PREFIX}other": "a lie"},
    }
    image = finished(tmp_path / "layout", config={"config": runtime, "history": [{"created_by": "RUN x"}]})
    config = json.loads(image.config)
    assert config["config"]["Labels"] == {"theirs": "stays", "plain": "ours too", SOURCE_ID: "ours"}
    assert config["config"]["Cmd"] == ["python", "-m", "x"]
    assert config["history"] == [{"created_by": "RUN x"}]
    assert config["created"] == "2024-05-06T07:08:09.123000Z"
    manifest = json.loads(image.manifest)
    assert manifest["annotations"] == {SOURCE_ID: "ours"}
    assert (
        Descriptor.from_json(manifest["config"]) == image.config_descriptor == Descriptor.of(image.config, OCI_CONFIG)
    )
    assert image.descriptor == Descriptor.of(image.manifest, OCI_MANIFEST, AMD64)


def test_docker_types_become_those_of_oci(tmp_path: Path) -> None:
    image = finished(
        tmp_path / "layout",
        layer_type="application/vnd.docker.image.rootfs.diff.tar.gzip",
        manifest_type=DOCKER_MANIFEST,
        config_type="application/vnd.docker.container.image.v1+json",
    )
    assert {layer.media_type for layer in image.layers} == {f"{OCI_LAYER}+gzip"}
    assert "docker" not in image.manifest.decode()


@pytest.mark.parametrize("config", [{}, {"config": None}, {"config": {}}, {"config": {"Labels": None}}])
def test_labels_are_set_where_there_were_none(config, tmp_path: Path) -> None:
    image = finished(tmp_path / "layout", config=config)
    assert json.loads(image.config)["config"]["Labels"] == {SOURCE_ID: "ours", "plain": "ours too"}


def test_the_config_names_the_planned_variant(tmp_path: Path) -> None:
    image = finished(tmp_path / "layout", architecture="arm")
    assert read_config(image.config)[0] == ARM
    assert json.loads(image.config)["variant"] == "v7"
    assert image.descriptor.platform == ARM


def test_a_finished_image_is_reproducible(tmp_path: Path) -> None:
    assert finished(tmp_path / "one") == finished(tmp_path / "two")


def test_an_index_is_ordered_and_read_back(tmp_path: Path) -> None:
    images = [finished(tmp_path / name, architecture=name).descriptor for name in ("arm", "amd64")]
    content = index(images, annotations={SOURCE_ID: "ours"})
    assert content == index(reversed(images), annotations={SOURCE_ID: "ours"})
    assert media_type_of(content) == OCI_INDEX
    there = read_published(content, OCI_INDEX, images_of(content))
    assert there.platforms == {AMD64: images[1], ARM: images[0]}
    assert (there.source_id, there.digest) == ("ours", Digest.of(content))


@pytest.mark.parametrize("platforms", [[AMD64, AMD64], [None]])
def test_an_index_names_each_platform_once(platforms) -> None:
    with pytest.raises(ValueError, match="no platform"):
        index((Descriptor.of(b"x", OCI_MANIFEST, platform) for platform in platforms), annotations={})


def test_attestations_and_entries_without_a_platform_are_ignored() -> None:
    plain = Descriptor.of(b"x", OCI_MANIFEST).to_json()
    unknown = {**plain, "platform": {"os": "unknown", "architecture": "unknown"}}
    linux = {**plain, "platform": {"os": "linux", "architecture": "amd64"}}
    statement = {**linux, "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}
    other = {**linux, "mediaType": "application/vnd.example+json"}
    windows = {**plain, "platform": {"os": "windows", "architecture": "amd64", "os.version": "10.0.20348.1"}}
    content = json.dumps({"manifests": [plain, unknown, statement, other, linux, windows]}).encode()
    assert sorted(map(str, images_of(content))) == ["linux/amd64", "windows/amd64"]


@pytest.mark.parametrize("told", sorted(MANIFESTS))
def test_a_document_of_two_media_types_is_refused(told: str) -> None:
    with pytest.raises(Malformed):
        media_type_of(to_bytes({"mediaType": OCI_INDEX}), told)


def test_times_are_written_in_utc() -> None:
    assert timestamp(datetime(2024, 1, 1, 1, tzinfo=timezone(timedelta(hours=2)))) == "2023-12-31T23:00:00Z"


@given(JSON)
def test_json_is_read_back_as_it_was_written(value) -> None:
    content = to_bytes({"value": value})
    assert from_bytes(content) == {"value": value}
    assert to_bytes(from_bytes(content)) == content


@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_document_is_an_object_or_malformed(content: bytes) -> None:
    for read in (from_bytes, read_config, images_of, media_type_of):
        with contextlib.suppress(Malformed):
            read(content)


@given(JSON | st.fixed_dictionaries({"mediaType": JSON, "digest": JSON, "size": JSON, "platform": JSON}))
def test_a_descriptor_is_one_or_malformed(value) -> None:
    with pytest.raises(Malformed):
        Descriptor.from_json(value)

"""Images and their names: what an author writes selects no other registry, repository or file, and costs little."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
import time
import uuid
import venv
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.clients import Registries
from builder.dockerfile.template import BaseImages
from builder.errors import BuilderError, BuildFailed, ExitCode, InvalidSettings, InvalidVersion
from builder.models import Inputs, ModelVersion, template_variables
from builder.oci import OCI_CONFIG, OCI_MANIFEST, BytesBlob, Descriptor, Malformed, from_bytes, to_bytes
from builder.oci.base_image import find_image
from builder.oci.manifest import MOST_BYTES, finished_image, open_layout
from builder.oci.rootfs import Archive, Budget, inflated
from builder.oci.target_rules import check_target, target_rules
from builder.publish.inspect import reference_of
from builder.reference import BasePattern, Platform, Reference, Repository
from builder.settings import Settings
from builder.wheels.install import WheelLayer
from builder.wheels.wheel import InvalidWheel, open_wheel
from tests.oci.layouts import CONFIG, Layout, make_layout
from tests.wheels.made import INFO, METADATA, NAME, PYTHON, WHEEL, digest, entry, make

AMD64 = Platform("linux", "amd64")
A, B = "a" * 64, "b" * 64
GOOD = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "REGISTRY_URL": "quay.io/domino"}

# ---- ALLOWED_BASE_IMAGES


def chosen(wanted: str, *patterns: str) -> str:
    settings = Settings.from_environ({**GOOD, "ALLOWED_BASE_IMAGES": ",".join(patterns)})
    return BaseImages(default="a", allowed=settings.allowed_base_images, wanted=wanted).choose("3.11")


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ("python:443/evil/img", "python:*"),
        ("python:443/evil/img:1", "python:*"),
        ("python.evil.io/x", "python*"),
        ("quay.io.evil.io/team/x", "quay.io/team/*"),
        ("evilquay.io/team/x", "*.quay.io/team/*"),
        ("quay.io/team/x", "*.quay.io/team/*"),
        ("quay.io:443/team/x", "quay.io/team/*"),
        ("evil.io/quay.io/team/x", "quay.io/team/*"),
        ("evil.io/library/python:3", "docker.io/library/python:*"),
        ("docker.io/evil/python:3", "python:*"),
        ("python/evil:3", "python:*"),
        ("python/evil", "python*"),
        ("quay.io/team-evil/x", "quay.io/team/*"),
        ("quay.io/team", "quay.io/team/*"),
        ("quay.io/team/a/b", "quay.io/team/a"),
        ("quay.io/team/a/b:1", "quay.io/team/?"),
        ("quay.io/team/a/b", "quay.io/team/a*"),
        ("localhost:5000/x", "localhost:*"),
        ("localhost:5001/x", "localhost:5000/*"),
        ("localhost:5001/x", "localhost/*"),
        ("localhost/x", "localhost:5000/*"),
        ("[::1]:5000/x", "[:]:5000/x"),
        ("[::2]:5000/x", "[::1]:5000/x"),
        # A digest beside a tag decides what is pulled: any image of the repository.
        (f"python:3.11@sha256:{A}", "python:3.11"),
        (f"python:3.11@sha256:{A}", "python:3.*"),
        (f"python@sha256:{A}", "python:3.11"),
        (f"python@sha256:{A}", f"python@sha256:{B}"),
        ("python:3.11", "python@*"),
        ("python:3.11", "python:3.11-*"),
        ("python:3.11", "Python3.org/python:3.11"),
    ],
)
def test_a_pattern_takes_no_other_image(wanted, pattern):
    with pytest.raises(InvalidVersion, match="ALLOWED_BASE_IMAGES does not allow") as caught:
        chosen(wanted, pattern)
    assert caught.value.exit_code == ExitCode.DATA


@pytest.mark.parametrize(
    ("wanted", "pattern", "whole"),
    [
        ("python:3.11", "python:*", "docker.io/library/python:3.11"),
        ("library/python:3.11", "python:*", "docker.io/library/python:3.11"),
        ("docker.io/python:3.11", "index.docker.io/library/python:3.*", "docker.io/library/python:3.11"),
        ("Index.Docker.IO/library/python:3.11", "python", "docker.io/library/python:3.11"),
        ("python", "python:latest", "docker.io/library/python:latest"),
        ("python:3.11-slim", "python:3.1[12]-s*m", "docker.io/library/python:3.11-slim"),
        ("bitnami/python:3", "bitnami/*", "docker.io/bitnami/python:3"),
        ("bitnami/python:3", "docker.io/*", "docker.io/bitnami/python:3"),
        ("QUAY.IO/team/x:V1", "quay.io/team/*:V?", "quay.io/team/x:V1"),
        ("quay.io/team/x:1", "Quay.io/team/*", "quay.io/team/x:1"),
        ("quay.io/team/a/b:1", "quay.io/team/*", "quay.io/team/a/b:1"),
        ("quay.io/team/a/b:1", "quay.io/team/**", "quay.io/team/a/b:1"),
        ("quay.io/team/a/b:1", "quay.io/*/a/b", "quay.io/team/a/b:1"),
        ("eu.quay.io/team/x:1", "*.quay.io/team/x", "eu.quay.io/team/x:1"),
        ("localhost:5000/x:1", "localhost:*/*", "localhost:5000/x:1"),
        ("[::1]:5000/x:1", "[::1]:5000/x", "[::1]:5000/x:1"),
        (f"python:3@sha256:{A}", "python:*", f"docker.io/library/python:3@sha256:{A}"),
        (f"python@sha256:{A}", "python:*", f"docker.io/library/python@sha256:{A}"),
        (f"python@sha256:{A}", "python", f"docker.io/library/python@sha256:{A}"),
        (f"python@sha256:{A}", f"python@sha256:{A}", f"docker.io/library/python@sha256:{A}"),
        (f"python:3@sha256:{A}", "python:3@sha256:*", f"docker.io/library/python:3@sha256:{A}"),
        (f"any.io/x@sha256:{A}", "*@sha256:*", f"any.io/x@sha256:{A}"),
        ("any.io/x/y:1", "*", "any.io/x/y:1"),
    ],
)
def test_an_honest_pattern_takes_its_images_and_the_whole_reference_goes_on(wanted, pattern, whole):
    assert chosen(wanted, pattern) == whole


@pytest.mark.parametrize(
    "pattern",
    [
        "*/team/x",
        "quay.io/",
        "quay.io/team/",
        "quay.io//x",
        "quay.io/**/x",
        "quay.io/Team/*",
        "https://quay.io/*",
        "user@quay.io/x",
        "quay.io/x:",
        "quay.io/x@",
        "python@sha256:abc",
        f"python@sha256:{A[:-1]}*",
        "python@md5:*",
        "a?.io/x",
        "quay.io*/team/*",
        "*:5000/x",
        "q*.io/x",
        "quay.io:5000000/x",
        "quay.io:http/x",
        "a b",
        "quay.io/../x",
        "²/x.y",
        ":1",
        "@",
    ],
)
def test_a_pattern_that_cannot_be_read_is_the_settings_fault(pattern):
    with pytest.raises(InvalidSettings, match="ALLOWED_BASE_IMAGES is malformed") as caught:
        Settings.from_environ({**GOOD, "ALLOWED_BASE_IMAGES": f"python:*,{pattern}"})
    assert caught.value.exit_code == ExitCode.CONFIG


@given(st.text(alphabet=st.sampled_from(list("ab.:/@*-0localhost")), max_size=14), st.sampled_from([":*", ":1*", "/*"]))
def test_whatever_is_asked_for_a_pattern_takes_what_it_names_alone(wanted, end):
    pattern = BasePattern.parse(f"localhost:5000/a{end}")
    try:
        reference = Reference.parse(wanted)
    except BuilderError:
        return
    if pattern.matches(reference):
        assert reference.repository.host == "localhost:5000"
        assert reference.repository.path == "a" or (end == "/*" and reference.repository.path.startswith("a/"))


def test_a_pattern_of_many_stars_is_read_in_linear_time():
    pattern = BasePattern.parse("quay.io/" + "*a" * 40 + "b")
    assert not pattern.matches(Reference.parse("quay.io/" + "a" * 200_000))


# ---- the repositories that are no model's


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        ("wheel-layers", {}),
        ("layers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("wheel-layers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("layers", {"WHEEL_LAYERS": "Quay.io/domino/layers/"}),
        ("cache", {"BUILD_CACHE": "quay.io/domino/cache"}),
        ("cache", {"BUILD_CACHE": "QUAY.IO:443/domino/cache"}),
        ("cache", {"BUILD_CACHE": "quay.io:0443/domino/cache", "WHEEL_LAYERS": "quay.io/domino/x"}),
        ("cache", {"REGISTRY_URL": "docker.io/acme", "BUILD_CACHE": "index.docker.io/acme/cache"}),
        ("cache", {"REGISTRY_URL": "docker.io/acme", "BUILD_CACHE": "registry-1.docker.io:443/acme/cache"}),
        ("cache", {"REGISTRY_URL": "quay.io:5000/domino", "BUILD_CACHE": "quay.io:05000/domino/cache"}),
        ("cache", {"REGISTRY_URL": "[::1]:5000/domino", "BUILD_CACHE": "[0:0::0001]:5000/domino/cache"}),
        ("layers", {"REGISTRY_URL": "docker.io/acme", "WHEEL_LAYERS": "registry-1.docker.io/acme/layers"}),
        ("layers", {"REGISTRY_URL": "127.0.0.1:5000", "WHEEL_LAYERS": "127.0.0.1:5000/layers"}),
        ("_layers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("layers/", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("layers/x", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("Layers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("\uff4cayers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("../domino/layers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
    ],
)
def test_wheel_layers_and_the_cache_are_no_models_repository(name, environ):
    settings = Settings.from_environ({**GOOD, **environ})
    repository = settings.repository_of(name)
    for ours in (settings.wheel_layer_repository, settings.build_cache):
        assert ours is None or not ours.holds(repository)
    assert repository.path.rpartition("/")[2].count("--x") == 1


TWINS = ["fraud", "Fraud", "fraud ", "\uff46raud", "fra\u200bud", "\u202efraud", "fra\u00adud", "fr\u0430ud", "fraud\n", "-rf",
         "$(id)", "fraud/", "./fraud", "fraud--x00000000000000000000", "frau\u0308d", "fra\u00fcd"]  # fmt: skip


def test_names_that_look_the_same_have_repositories_of_their_own():
    settings = Settings.from_environ(GOOD)
    repositories = [settings.repository_of(name) for name in TWINS]
    assert len(set(repositories)) == len(TWINS)
    for repository in repositories:
        assert re.fullmatch(r"domino/[a-z0-9]+(?:[._-]+[a-z0-9]+)*", repository.path)


def test_a_models_images_and_its_template_agree_on_that_repository():
    settings = Settings.from_environ({**GOOD, "WHEEL_LAYERS": "quay.io/domino/layers"})
    version = ModelVersion(name="layers", version="1", created_ms=0)
    reference = reference_of(settings, version)
    assert str(reference.repository).startswith("quay.io/domino/layers--x")
    variables = template_variables(version, Inputs.of(version), settings.component_of(version.name))
    assert variables["model_name"] == reference.repository.path.rpartition("/")[2]


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        ("layers", {}),
        ("layers", {"WHEEL_LAYERS": "quay.io/domino/all/layers"}),
        ("all", {"WHEEL_LAYERS": "quay.io/domino/all/layers"}),
        ("cache", {"BUILD_CACHE": "quay.io/other/cache"}),
        ("cache", {"BUILD_CACHE": "quay.io.example.com/domino/cache"}),
        ("cache", {"BUILD_CACHE": "quay.io:5000/domino/cache"}),
    ],
)
def test_a_name_that_nothing_of_ours_has_stays_as_it_is(name, environ):
    assert Settings.from_environ({**GOOD, **environ}).repository_of(name).path == f"domino/{name}"


@pytest.mark.parametrize(
    "environ",
    [
        {"WHEEL_LAYERS": "quay.io/domino"},
        {"REGISTRY_URL": "quay.io/domino/wheel-layers", "WHEEL_LAYERS": "quay.io/domino/wheel-layers"},
        {"REGISTRY_URL": "quay.io/domino/layers/models", "WHEEL_LAYERS": "quay.io/domino/layers"},
        {"REGISTRY_URL": "docker.io/acme/x", "WHEEL_LAYERS": "Index.docker.io/acme"},
        {"BUILD_CACHE": "quay.io/domino"},
        {"BUILD_CACHE": "quay.io:443/domino"},
        {"REGISTRY_URL": "quay.io/cache/models", "BUILD_CACHE": "quay.io/cache"},
    ],
)
def test_models_do_not_lie_below_what_is_ours(environ):
    with pytest.raises(InvalidSettings, match="REGISTRY_URL is the same or below it"):
        Settings.from_environ({**GOOD, **environ})


# ---- layers of a base image


def header(kind: bytes, size: int) -> bytes:
    entry = tarfile.TarInfo("PaxHeader")
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.USTAR_FORMAT)


def extended(content: bytes, kind: bytes = b"x") -> bytes:
    return header(kind, len(content)) + content + bytes(-len(content) % 512)


def read(archive: bytes) -> list[tarfile.TarInfo]:
    return list(Archive(archive[start : start + (1 << 20)] for start in range(0, len(archive), 1 << 20)))


RECORDS = {"short": b"6 a=b\n", "names": b"10 path=x\n", "sparse": b"20 GNU.sparse.a=bcd\n"}


def cost(content: bytes) -> float:
    archive = extended(content) + header(b"0", 0)
    times = []
    for _ in range(3):
        began = time.thread_time()
        assert read(archive)[0].size == 0
        times.append(time.thread_time() - began)
    return min(times)


@pytest.mark.parametrize("name", RECORDS)
def test_pax_records_are_read_in_linear_time(name):
    record, much = RECORDS[name], 1 << 20
    few, many = (record * (size // len(record)) for size in (much // 16, much))
    # Sixteen times as much costs sixteen times as much; it was a hundred times while each record copied the rest. By
    # turns, since a machine that others use is slower now and then.
    assert min((cost(many) - 0.02) / cost(few) for _ in range(3)) < 35


def test_a_long_record_is_read_in_linear_time():
    assert cost(b"1048576 comment=".ljust((1 << 20) - 1, b"x") + b"\n") < 0.5


@pytest.mark.parametrize(
    "content",
    [
        b"9" * 19 + b" path=x\n",
        b"9" * 5000 + b" path=x\n",
        b"0" * 5000 + b"10 path=x\n",
        b"+9 path=x\n",
        b"-9 path=x\n",
        "²9 path=x\n".encode(),
        b" 9 path=x\n",
        b"1_0 path=x\n",
        b"3 =\n",
        b"2 \n",
        b"1\n",
        b"\n",
        b"99 path=x\n",
        b"5 path=x\n",
    ],
)
def test_an_invalid_record_length_is_refused(content):
    with pytest.raises(Malformed, match="malformed pax header"):
        read(extended(content) + header(b"0", 0))


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_headers_without_an_entry_have_a_bound(kind):
    content = {b"x": b"10 path=x\n", b"g": b"10 path=x\n"}.get(kind, b"name\0") * 1000
    with pytest.raises(Malformed, match="too many before one entry"):
        read(extended(content, kind) * 300 + header(b"0", 0))


@pytest.mark.parametrize(
    "archive",
    [
        header(b"0", 0) * 2000,
        extended(b"6 a=b\n" * 2000) + header(b"0", 0),
        header(b"S", 0)[:482] + b"\1" + header(b"S", 0)[483:] + (bytes(504) + b"\1" + bytes(7)) * 2000,
    ],
    ids=["headers", "records", "maps of sparse files"],
)
def test_steps_are_bounded_for_the_image(archive, monkeypatch):
    if archive[156:157] == b"S":
        total = sum(archive[:148]) + 8 * 32 + sum(archive[156:512])
        archive = archive[:148] + b"%06o\0 " % total + archive[156:]
    budget = Budget(1000)
    with pytest.raises(Malformed, match="too many headers and records"):
        list(Archive(iter([archive]), budget))


def test_empty_gzip_members_are_bounded():
    with pytest.raises(Malformed, match="too many headers and records"):
        list(inflated([gzip.compress(b"") * 2000], 1 << 20, Budget(1000)))
    assert b"".join(inflated([gzip.compress(b"a") * 500], 1 << 20, Budget(1000))) == b"a" * 500


@pytest.mark.parametrize("variant", ["v99999999999", "v" + "9" * 30, "v07x", "x"])
def test_a_platform_of_any_number_costs_nothing(registry, variant):
    config = to_bytes({"os": "linux", "architecture": "arm", "variant": "v6", "rootfs": {"diff_ids": []}})
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": Descriptor.of(config, OCI_CONFIG).to_json(),
        "layers": [],
    }
    with Registries() as registries:
        client = registries.for_host(registry.host)
        repository = Repository(registry.host, f"hostile/{uuid.uuid4().hex}")
        client.push_blob(repository, BytesBlob(config))
        client.put_manifest(repository, to_bytes(manifest), OCI_MANIFEST, "v1")
        with pytest.raises(InvalidVersion, match="it has linux/arm/v6"):
            find_image(client, repository.tag("v1"), Platform.parse(f"linux/arm/{variant}"))


# ---- wheels in the environment

PYTHON_FOLDER = f"lib/python{PYTHON}"


@pytest.mark.parametrize(
    "member",
    [
        "data/bin",
        "data/lib",
        "data/lib64",
        "data/share",
        "data/etc",
        "data/include",
        "data/include/site",
        f"data/include/site/python{PYTHON}",
        f"data/{PYTHON_FOLDER}",
        f"data/{PYTHON_FOLDER}/site-packages",
        f"data/lib64/python{PYTHON}/site-packages",
        "data/pyvenv.cfg",
        "data/pyvenv.cfg/x",
        "data/bin/python",
        "data/bin/python/x",
        "data/bin/python3",
        f"data/bin/python{PYTHON}",
        # Read by Python before the environment's own, or in place of its whole path.
        "data/bin/pyvenv.cfg",
        "data/bin/python._pth",
        f"data/bin/python{PYTHON}._pth",
        "scripts/python",
        "scripts/python3/x",
        "scripts/pyvenv.cfg",
        "scripts/python._pth",
    ],
)
def test_no_wheel_replaces_a_part_of_the_environment(tmp_path, member):
    path = make(tmp_path, {f"demo-1.0.data/{member}": b"x"})
    with pytest.raises(InvalidWheel, match="a part of the environment itself") as caught:
        WheelLayer(open_wheel(path, filename=NAME), python=PYTHON)
    assert NAME in caught.value.what
    assert f"demo-1.0.data/{member}" in caught.value.what
    assert caught.value.exit_code in {ExitCode.DATA, ExitCode.CANNOT_CREATE}


def test_an_entry_point_is_not_the_interpreter(tmp_path):
    path = make(tmp_path, {f"{INFO}/entry_points.txt": b"[console_scripts]\npython._pth = demo:main\n"})
    with pytest.raises(InvalidWheel, match=r"a script of its entry points would replace 'opt/model/bin/python\._pth'"):
        WheelLayer(open_wheel(path, filename=NAME), python=PYTHON)


def test_what_would_replace_the_interpreters_path_does():
    # Why ._pth and bin/pyvenv.cfg are refused: this Python takes them, in an environment as the image has it.
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, symlinks=True)
        program = Path(folder) / "bin" / "python"
        assert subprocess.run([program, "-c", ""], check=False).returncode == 0
        (program.parent / "python._pth").write_text("/nonexistent\n")
        assert subprocess.run([program, "-c", ""], check=False, capture_output=True).returncode != 0


@pytest.mark.parametrize(
    "member",
    ["data/bin/tool", "data/lib/x.so", "data/share/x/y", "scripts/pythonic", "data/include/x.h", "data/binary"],
)
def test_what_a_wheel_may_put_beside_it(tmp_path, member):
    path = make(tmp_path, {f"demo-1.0.data/{member}": b"x"})
    assert b"".join(WheelLayer(open_wheel(path, filename=NAME), python=PYTHON))


def test_a_file_and_a_directory_of_two_wheels_are_the_same_in_one_layer_and_in_two(tmp_path):
    def wheel(name, files):
        info = f"{name}-1.0.dist-info"
        files = {**files, f"{info}/METADATA": METADATA.replace(b"demo", name.encode()), f"{info}/WHEEL": WHEEL}
        record = "".join(f"{path},{digest(content)},{len(content)}\n" for path, content in files.items())
        path = tmp_path / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
                archive.writestr(entry(member), content)
        return open_wheel(path, filename=path.name)

    def unpacked(*wheels):
        content = gzip.decompress(b"".join(WheelLayer(*wheels, python=PYTHON)))
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = archive.getmembers()
            assert len({member.name for member in members}) == len(members)
            return {member.name: member.isdir() for member in members}

    below = {"one/a.py": b"1", "two": b"2", "both/x": b"3"}
    above = {"one": b"4", "two/b.py": b"5", "both/y": b"6"}
    lower, upper = unpacked(wheel("lower", below)), unpacked(wheel("upper", above))
    lower = {
        path: is_folder
        for path, is_folder in lower.items()
        if not any(upper.get(str(parent)) is False for parent in Path(path).parents)
    }
    together = unpacked(wheel("upper", above), wheel("lower", below))
    assert together == {**lower, **upper}


# ---- layouts that an engine, or a RUN step beside it, left


def hollow(made: Layout, size: int, *, data: bytes = b"x") -> None:
    """Give the first layer a file of a size that takes hardly any room."""
    layers = made.manifest()["layers"]
    path = made.folder / "blobs" / "sha256" / layers[0]["digest"].removeprefix("sha256:")
    layers[0]["size"] = size
    made.index(made.image(layers=layers))
    path.write_bytes(data)
    os.truncate(path, size)


@pytest.mark.parametrize("data", [b"", b"x", b"x" * (8 << 20)], ids=["nothing", "a byte", "much"])
def test_a_layer_of_holes_is_refused_before_it_is_read(tmp_path, data):
    made = make_layout(tmp_path / "layout")
    hollow(made, 200 << 30, data=data)
    began = time.process_time()
    with pytest.raises(BuildFailed, match="mostly holes") as caught:
        open_layout(made.folder, AMD64)
    # To read it would take minutes.
    assert time.process_time() - began < 5
    assert caught.value.exit_code == ExitCode.CANNOT_CREATE


def test_a_layer_of_holes_counts_by_its_size(tmp_path):
    made = make_layout(tmp_path / "layout")
    hollow(made, 300 << 30)
    with pytest.raises(BuildFailed, match=f"larger than {MOST_BYTES} bytes"):
        open_layout(made.folder, AMD64)


def test_a_layer_with_few_holes_is_a_layer(tmp_path):
    made = make_layout(tmp_path / "layout")
    layers = made.manifest()["layers"]
    path = tmp_path / "layer"
    with path.open("wb") as file:
        file.write(os.urandom(3 << 20))
        file.seek(1 << 20, os.SEEK_CUR)
        file.write(b"x")
    content = path.read_bytes()
    blob = {**made.blob(content), "mediaType": layers[0]["mediaType"]}
    path.rename(made.folder / "blobs" / "sha256" / blob["digest"].removeprefix("sha256:"))
    made.index(made.image(layers=[blob, *layers[1:]]))
    assert open_layout(made.folder, AMD64).layers[0].size == len(content)


def test_a_file_of_another_size_is_refused_before_it_is_read(tmp_path):
    made = make_layout(tmp_path / "layout")
    layers = made.manifest()["layers"]
    path = made.folder / "blobs" / "sha256" / layers[1]["digest"].removeprefix("sha256:")
    os.truncate(path, 1 << 40)
    with pytest.raises(BuildFailed, match=f"holds something else: {1 << 40} bytes"):
        open_layout(made.folder, AMD64)


CONFIG_OF = {"os": "linux", "architecture": "amd64"}


def with_config(folder: Path, content: bytes) -> Layout:
    made = make_layout(folder)
    made.index(made.image(config=made.blob(content, CONFIG)))
    return made


def rootfs(made: Layout) -> dict[str, Any]:
    config = made.manifest()["config"]["digest"].removeprefix("sha256:")
    found: dict[str, Any] = json.loads((made.folder / "blobs" / "sha256" / config).read_bytes())["rootfs"]
    return found


DOCUMENTS = [
    b'{"a":' + b"[" * 60 + b"]" * 60 + b"}",
    # What can just be read, and not be written again one call further down.
    b'{"a":' + b"[" * 950 + b"]" * 950 + b"}",
    b'{"a":' * 980 + b"1" + b"}" * 980,
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b'{"a": 1e400}',
    b'{"a": -1e400}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": NaN}',
    b'{"a": -Infinity}',
    b'{"a": 1}{"b": 2}',
    b"null",
    b"",
    b'"a"',
    b"\xff\xfe",
]


@pytest.mark.parametrize("content", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_a_document_that_is_deep_or_odd_is_refused(tmp_path, content):
    with pytest.raises(Malformed):
        from_bytes(content)
    made = with_config(tmp_path / "layout", content)
    with pytest.raises(BuildFailed, match="cannot be used"):
        open_layout(made.folder, AMD64)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=20,
    )
)
def test_what_was_read_can_be_written(value):
    try:
        found = from_bytes(json.dumps(value).encode())
    except Malformed:
        return
    assert from_bytes(to_bytes(found)) == found


@pytest.mark.parametrize("size", [1.0, 1e2, -1, True, "1", None, [1], 1 << 60, 10**400])
def test_a_size_is_a_number_of_bytes(tmp_path, size):
    made = make_layout(tmp_path / "layout")
    layers = made.manifest()["layers"]
    layers[0]["size"] = size
    made.index(made.image(layers=layers))
    with pytest.raises(BuildFailed, match="no valid size"):
        open_layout(made.folder, AMD64)


def test_of_a_key_that_stands_twice_one_meaning_is_pushed(tmp_path):
    made = make_layout(tmp_path / "layout")
    layers = json.dumps(rootfs(made))
    content = (
        f'{{"os":"linux","architecture":"amd64","rootfs":{layers},"config":{{"User":"0"}},"config":{{"User":"1"}}}}'
    )
    image = open_layout(with_config(tmp_path / "other", content.encode()).folder, AMD64)
    finished = finished_image(image, labels={}, annotations={}, created=datetime.now(tz=UTC))
    assert finished.config.count(b'"config"') == 1
    assert b'"User":"1"' in finished.config


@pytest.mark.parametrize(
    "runtime",
    [
        {"User": "a" * 3_000_000},
        {"User": ["a"]},
        {"User": 10**4000},
        {"User": "²"},
        {"User": "\ud800"},
        {"ExposedPorts": {str(number): {} for number in range(70_000, 270_000)}},
        {"ExposedPorts": {"a" * 3_000_000: {}}},
        {"ExposedPorts": {"²/tcp": {}}},
        {"ExposedPorts": {"\ud800": {}}},
        {"ExposedPorts": {"9" * 5000: {}}},
        {"ExposedPorts": "a" * 1_000_000},
        {"ExposedPorts": [1]},
    ],
    ids=range(12),
)
def test_a_broken_rule_is_reported_quickly_and_briefly(tmp_path, runtime):
    made = make_layout(tmp_path / "layout")
    content = json.dumps({**CONFIG_OF, "rootfs": rootfs(made), "config": runtime}).encode()
    image = open_layout(with_config(tmp_path / "other", content).folder, AMD64)
    began = time.process_time()
    with pytest.raises(InvalidVersion, match="breaks") as caught:
        check_target(
            target_rules("pltr_foundry"),
            reference=Reference.parse("quay.io/a:v1"),
            platforms=[AMD64],
            images=[(AMD64, image.config, image.layers)],
        )
    caught.value.one_line().encode()
    assert len(str(caught.value)) < 400_000
    assert time.process_time() - began < 5

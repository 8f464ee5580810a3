"""Versions that the wheels method cannot make an image of: what is said, and which platforms an engine makes."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from builder.errors import ExitCode, InvalidSettings, InvalidVersion
from builder.publish import publish
from builder.wheels.uv import NoWheel, Unsatisfiable
from tests.package_index.server import make_wheel
from tests.servers.small import push_base, rootfs
from tests.wheels.test_method import content

BOTH = {"MODEL_PLATFORMS": "linux/amd64,linux/arm64"}
# Builds a wheel without anything that would have to be downloaded.
BACKEND = """\
import pathlib, shutil
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    (wheel,) = pathlib.Path(__file__).parent.glob("*.whl")
    shutil.copy(wheel, wheel_directory)
    return wheel.name
"""
PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "source-only"
version = "1.0"
"""


@pytest.fixture(scope="module", autouse=True)
def source_only(packages):
    """Add a package that has to be built, but on arm64."""
    packages.add("source-only", "1.0", tag="cp311-cp311-manylinux_2_17_aarch64")
    built, wheel = make_wheel("source-only", "1.0", files={"source_only/__init__.py": b"HOW = 'built'\n"})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        members = {"pyproject.toml": PYPROJECT, "backend.py": BACKEND, built: wheel}
        members["PKG-INFO"] = "Metadata-Version: 2.1\nName: source-only\nVersion: 1.0\n"
        for name, text in members.items():
            data = text if isinstance(text, bytes) else text.encode()
            entry = tarfile.TarInfo(f"source_only-1.0/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    packages.files["source-only"]["source_only-1.0.tar.gz"] = (buffer.getvalue(), "2020-01-01T00:00:00Z", False)


def test_an_engine_makes_the_platform_that_has_no_wheel(small, small_settings, base_image, runtime, crane, caplog):
    client = {"client/app.py": "import source_only\nprint('prediction', source_only.HOW)\n"}
    model = small("source-only\n", files=client, tags=BOTH)
    published = publish(small_settings(model, BASE_IMAGE=base_image, BUILD_ENGINE="buildah"))
    assert "an engine builds this platform" in caplog.text
    assert "source-only has no wheel for linux/amd64" in caplog.text
    manifests = json.loads(crane("manifest", str(published.reference)))["manifests"]
    methods = {}
    for each in manifests:
        notes = json.loads(crane("manifest", f"{published.reference.repository}@{each['digest']}"))["annotations"]
        methods[each["platform"]["architecture"]] = notes.get("io.modelimage.method", "dockerfile")
    assert methods == {"amd64": "dockerfile", "arm64": "wheels"}
    assert "PASS" in crane("validate", "--remote", str(published.reference))
    assert runtime.output(published.reference, options=["--platform", "linux/amd64"]) == "prediction built\n"


def test_no_wheel_and_no_engine(small, small_settings, registry):
    model = small("only-amd64\n", tags=BOTH)
    before = content(registry.storage)
    # Kaniko is not on this machine, so that there is no engine.
    with pytest.raises(NoWheel) as caught:
        publish(small_settings(model, BUILD_ENGINE="kaniko"))
    assert caught.value.exit_code == 73
    error = model.outcome()["error"]
    for said in ("only-amd64", "linux/arm64", "BUILD_ENGINE", "Dockerfile.template", "MODEL_PLATFORMS"):
        assert said in error
    assert model.outcome()["state"] == "failed"
    after = content(registry.storage)
    # What was found out of the base is kept; no image is there.
    assert not [path for path in after.keys() - before.keys() if f"/{model.name}/{model.name}/" in path]


def test_without_an_engine_source_alone_is_named_first(small, small_settings, packages):
    """Of more than one version uv says "all versions of … have no usable wheels"."""
    packages.add_source("never-built", "1.0")
    packages.add_source("never-built", "1.1")
    model = small("never-built\n")
    with pytest.raises(NoWheel) as caught:
        publish(small_settings(model, BUILD_ENGINE="kaniko"))
    assert caught.value.exit_code == 73
    assert model.outcome()["error"].startswith("NoWheel: never-built has no wheel for linux/amd64")


def test_no_engine_is_tried_for_what_is_another_system_s(small, small_settings, packages, monkeypatch):
    packages.add("of-windows", "306", tag="cp311-cp311-win_amd64")
    monkeypatch.setattr("builder.publish.prepare.select_engine", lambda *_: pytest.fail("an engine was asked for"))
    model = small("of-windows==306\n")
    with pytest.raises(NoWheel, match="no engine can build it") as caught:
        publish(small_settings(model, BUILD_ENGINE="buildah"))
    assert caught.value.exit_code == 73
    assert "of-windows; sys_platform == 'win32'" in model.outcome()["error"]


CONDA = """\
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip
  - gdal=3.9
  - pip:
    - small-app
"""
REFUSED = {
    "a conda package": ({"mymodel/requirements.txt": None, "mymodel/conda.yaml": CONDA}, ["gdal", "Dockerfile.template"]),
    "a git requirement": (
        {"mymodel/requirements.txt": "small-app\nlib @ git+https://git.example.com/team/lib@main\n"},
        ["lib @ git+https://", "a repository is source"],
    ),
    "an editable requirement": ({"mymodel/requirements.txt": "-e ./src\n"}, ["-e ./src"]),
    "nonsense": ({"mymodel/requirements.txt": "small-app ===== 1\n"}, ["small-app ===== 1"]),
    "another file": ({"mymodel/requirements.txt": "-r ../../etc/passwd\n"}, ["../../etc/passwd"]),
    "an unknown package": ({"mymodel/requirements.txt": "nobody-has-this\n"}, ["nobody-has-this"]),
    "a version that is not there": ({"mymodel/requirements.txt": "small-app==9\n"}, ["small-app==9"]),
}  # fmt: skip


@pytest.mark.parametrize(("files", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_requirements_that_cannot_be_used_are_named(small, small_settings, files, said):
    model = small(files=files)
    with pytest.raises(InvalidVersion) as caught:
        publish(small_settings(model))
    assert caught.value.exit_code == 65
    assert caught.value.remedy
    for word in said:
        assert word in str(caught.value)
        assert word in model.outcome()["error"]


def test_a_conflict_is_explained_as_uv_explains_it(small, small_settings):
    model = small("small-app\nneeds-old\n")
    with pytest.raises(Unsatisfiable) as caught:
        publish(small_settings(model))
    assert caught.value.exit_code == 65
    assert "small-lib<1" in str(caught.value)
    assert "needs-old" in model.outcome()["error"]


BASES = {
    "no such image": (None, "does not exist"),
    "another Python": ({"python": "3.12"}, r"has no Python 3\.11 for linux/amd64; it has 3\.12"),
    "musl": ({"musl": True}, "has musl"),
    "something at /opt/model": ({"occupied": True}, "has something at /opt/model"),
    "another platform": ({"platforms": ("linux/arm64",)}, "has no image for linux/amd64; it has linux/arm64"),
    "too many layers": ({"layers": 71}, "has 71 layers; the limit is 70"),
}


@pytest.mark.parametrize(("options", "said"), BASES.values(), ids=BASES.keys())
def test_a_base_that_cannot_be_used_is_named(small, small_settings, registry, packages, options, said):
    model, asked = small(), len(packages.requests)
    base = f"{registry.host}/bases/{model.name}:1"
    if options and "layers" in options:
        options = {"layers": tuple(rootfs(python=f"3.{11 + number}") for number in range(options["layers"]))}
    if options is not None:
        push_base(registry.host, f"bases/{model.name}:1", **options)
    # An image that is not there is the setting's fault, and no attempt at the version.
    code = ExitCode.CONFIG if options is None else ExitCode.DATA
    with pytest.raises((InvalidVersion, InvalidSettings), match=said) as caught:
        publish(small_settings(model, BASE_IMAGE=base))
    assert caught.value.exit_code == code
    assert base.rpartition(":")[0] in str(caught.value)
    assert caught.value.remedy
    # Nobody was asked for packages that would have no place.
    assert len(packages.requests) == asked
    assert model.outcome()["state"] == "failed"


def test_a_wheel_that_is_gone_from_the_index_is_named(small, small_settings, packages):
    filename, _ = packages.add("leaves-soon", "1.0")
    model = small("leaves-soon\n")
    settings = small_settings(model)
    publish(settings)
    del packages.files["leaves-soon"][filename]
    # Its layer is known, so that nobody misses it.
    assert publish(settings, rebuild=True).reference
    elsewhere = small_settings(model, WHEEL_LAYERS=f"{settings.registry_url}/empty", RESOLVE_AS_OF="now")
    with pytest.raises(InvalidVersion, match="leaves-soon"):
        publish(elsewhere, rebuild=True)


def test_a_wheel_that_changed_since_its_lock_is_refused(small, small_settings, packages):
    filename, _ = packages.add("changes-soon", "1.0")
    model = small("changes-soon\n")
    settings = small_settings(model)

    def change(handler, path):
        if path.endswith(filename):
            packages.files["changes-soon"][filename] = (b"PK another", "2020-01-01T00:00:00Z", False)
        return False

    packages.faults = change
    try:
        with pytest.raises(Exception, match=filename) as caught:
            publish(settings)
    finally:
        packages.faults = None
    assert caught.value.exit_code != 70
    assert model.outcome()["state"] == "failed"

"""Locks of real environments, and of the indexes that people have."""

import json
import subprocess
import tarfile
import tomllib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from uv import find_uv_bin

from builder.errors import BuildFailed, InvalidSettings, InvalidVersion, PermissionRefused, ServiceUnavailable
from builder.http import RetryPolicy
from builder.package_index import Indexes, IndexUrl, built_in_index
from builder.package_index.client import IndexClient
from builder.process import run
from builder.reference import Platform
from builder.wheels.inputs import for_serving
from builder.wheels.lock import Lock
from builder.wheels.requirements import Requirements
from builder.wheels.resolve import lock
from builder.wheels.uv import NoWheel, Unsatisfiable, private_folder
from scripts.certificates import for_loopback, self_signed
from tests.package_index.server import machine_indexes, make_wheel, running
from tests.waiting import HANG, LONG_HANG

AMD64, ARM64, ARMV7, S390X = (Platform.parse(f"linux/{name}") for name in ("amd64", "arm64", "arm/v7", "s390x"))
GLIBC = (2, 36)
QUICK = RetryPolicy(attempts=2, first=0.001, longest=0.01, deadline=HANG)
NOON = datetime(2024, 6, 1, 12, tzinfo=UTC)
# uv has a name for the first; for the second it resolves universally, and the wheels are chosen from what it found.
BOTH = pytest.mark.parametrize("platform", [AMD64, ARMV7], ids=["named", "universal"])


@pytest.fixture(scope="module")
def machine():
    return machine_indexes()


@pytest.fixture
def index():
    with running() as found:
        found.add(
            "app", "1.0", requires=["lib>=1", "tool; platform_machine == 'armv7l'", "never; python_version < '3.10'"]
        )
        found.add("lib", "1.0", uploaded="2023-01-01T00:00:00Z")
        found.add("lib", "1.1", uploaded="2024-06-01T06:00:00Z")
        found.add("lib", "2.0", uploaded="2024-08-01T00:00:00Z")
        found.add("tool", "1.0")
        found.add("never", "1.0")
        for arch in ("x86_64", "aarch64"):
            found.add("compiled", "1.0", tag=f"cp311-cp311-manylinux_2_28_{arch}")
        yield found


def asked(index, **fields):
    return Indexes(default=IndexUrl(index.simple), **fields)


def locked(*lines, indexes, platform=AMD64, model=Path("/nonexistent"), **options):
    requirements = lines[0] if lines and isinstance(lines[0], Requirements) else Requirements.of(*lines)
    options = {"python": "3.11", "glibc": GLIBC, "timeout": LONG_HANG, **options}
    return lock(requirements, platform=platform, indexes=indexes, model=model, **options)


def versions(found):
    return {wheel.name: wheel.version for wheel in found.wheels}


# The machine's own index.


@pytest.mark.parametrize("platform", [AMD64, ARM64], ids=str)
def test_scikit_learn_resolves_as_of_a_date(machine, platform):
    found = locked("scikit-learn==1.5.2", indexes=machine, platform=platform, as_of=datetime(2025, 3, 1, 9, tzinfo=UTC))
    assert versions(found) == {
        "joblib": "1.4.2",
        "numpy": "2.2.3",
        "scikit-learn": "1.5.2",
        "scipy": "1.15.2",
        "threadpoolctl": "3.5.0",
    }
    machine_name = {"amd64": "x86_64", "arm64": "aarch64"}[platform.architecture]
    assert all(wheel.filename.endswith(("any.whl", f"{machine_name}.whl")) for wheel in found.wheels)
    assert found.as_of_enforced
    assert found.as_of == datetime(2025, 3, 1, tzinfo=UTC)
    assert all(wheel.url and wheel.size for wheel in found.wheels)
    again = locked(
        "scikit-learn==1.5.2", indexes=machine, platform=platform, as_of=datetime(2025, 3, 1, 22, tzinfo=UTC)
    )
    assert again.to_text() == found.to_text()
    assert Lock.from_text(found.to_text()) == found


def test_a_pure_environment_on_arm_v7_has_compiled_wheels_where_there_are(machine):
    found = locked(
        "pydantic-core==2.33.2", "six", indexes=machine, platform=ARMV7, as_of=datetime(2026, 1, 1, tzinfo=UTC)
    )
    assert found.as_of_enforced
    assert versions(found)["six"] == "1.17.0"
    assert "armv7l" in next(wheel.filename for wheel in found.wheels if wheel.name == "pydantic-core")


def test_no_compiled_wheel_on_arm_v7(machine):
    with pytest.raises(NoWheel, match="scipy has no wheel for linux/arm/v7") as caught:
        locked("scipy==1.15.2", indexes=machine, platform=ARMV7)
    assert (caught.value.package, caught.value.platform) == ("scipy", ARMV7)
    assert "engine" in caught.value.remedy


def test_the_same_lock_downloads_without_addresses(machine, tmp_path):
    kept = Lock.from_text(locked("iniconfig==2.0.0", indexes=machine).to_text())
    with IndexClient(machine) as client:
        client.download(kept.wheels[0], tmp_path / "wheel")
    assert (tmp_path / "wheel").stat().st_size == kept.wheels[0].size


# Platforms, tags, markers.


@BOTH
def test_markers_are_those_of_the_target(index, platform):
    found = locked("app", "six; sys_platform == 'win32'", indexes=asked(index), platform=platform)
    assert set(versions(found)) == {"app", "lib"} | ({"tool"} if platform == ARMV7 else set())
    assert all(wheel.url.startswith(index.url) for wheel in found.wheels)


@pytest.mark.parametrize(
    ("platform", "glibc", "fits"),
    [
        (AMD64, (2, 28), True),
        (AMD64, (2, 17), False),
        (ARM64, (2, 41), True),
        (ARM64, (2, 27), False),
        (AMD64, None, True),
        (ARMV7, GLIBC, False),
        (S390X, GLIBC, False),
    ],
)
def test_glibc_limits_what_fits(index, platform, glibc, fits):
    if fits:
        assert versions(locked("compiled", indexes=asked(index), platform=platform, glibc=glibc)) == {"compiled": "1.0"}
    else:
        with pytest.raises(NoWheel) as caught:
            locked("compiled", indexes=asked(index), platform=platform, glibc=glibc)
        assert caught.value.package == "compiled"


OTHERS = {
    "linux/arm/v7": "armv7l",
    "linux/s390x": "s390x",
    "linux/ppc64le": "ppc64le",
    "linux/riscv64": "riscv64",
    "linux/386": "i686",
    "linux/loong64": "loongarch64",
}


@pytest.mark.parametrize(("platform", "name"), OTHERS.items())
def test_an_older_version_where_the_newest_has_no_wheel_that_fits(index, platform, name):
    """Of a C library, and of the pair of interpreter and platform, a universal resolution knows nothing."""
    index.add("front", "1.0", requires=["back<3", "compiled-too"])
    index.add("front", "2.0", requires=["back>=3"])
    for version, tag in {
        "1.0": f"cp311-cp311-manylinux_2_28_{name}",
        "2.0": f"cp311-cp311-manylinux_2_39_{name}",
        "2.1": f"cp312-cp312-manylinux_2_28_{name}",
        "2.2": f"cp311-cp311-musllinux_1_2_{name}",
        "3.0": f"cp311-cp311-manylinux_2_40_{name}",
    }.items():
        index.add("back", version, tag=tag)
    index.add("back", "2.1", tag="cp311-cp311-manylinux_2_28_x86_64")
    index.add("compiled-too", "1.0", tag=f"py3-none-manylinux2014_{name}")
    index.add("compiled-too", "1.1", tag=f"py3-none-manylinux_2_37_{name}")
    ours = Platform.parse(platform)
    assert versions(locked("front", indexes=asked(index), platform=ours, glibc=(2, 36))) == {
        "back": "1.0",
        "compiled-too": "1.0",
        "front": "1.0",
    }
    assert versions(locked("front", indexes=asked(index), platform=ours, glibc=(2, 40))) == {
        "back": "3.0",
        "front": "2.0",
    }
    for line in ("back==2.0", "back>1.0", "compiled-too>1.0"):
        with pytest.raises(NoWheel) as caught:
            locked(line, indexes=asked(index), platform=ours, glibc=(2, 36))
        assert caught.value.package == line.partition(">")[0].partition("=")[0]
        assert caught.value.buildable


def test_a_version_with_a_local_label_where_the_plain_one_has_no_wheel_that_fits(index):
    index.add("torch", "2.0", tag="cp311-cp311-manylinux_2_39_armv7l")
    index.add("torch", "2.0+cpu", tag="cp311-cp311-manylinux_2_28_armv7l")
    index.add("torch", "2.0+gpu", tag="cp311-cp311-manylinux_2_39_armv7l")
    assert versions(locked("torch", indexes=asked(index), platform=ARMV7)) == {"torch": "2.0+cpu"}


def test_a_wheel_that_another_environment_needs_alone_is_left_out(index):
    """What uv cannot know of a machine, such as its kernel's release, it resolves for and marks."""
    index.add("split", "1.0", requires=["lib<2; platform_release > '5'", "lib>=2; platform_release <= '5'"])
    assert versions(locked("split", indexes=asked(index), platform=ARMV7)) == {"lib": "2.0", "split": "1.0"}


def test_a_uv_that_ignores_the_environment_gives_the_platform_s_wheels_all_the_same(index):
    """What a later release of uv may change: the wheels are chosen, and the markers evaluated, by us."""

    def another_uv(argv, **options):
        path = options["cwd"] / "pyproject.toml"
        kept = [line for line in path.read_text().splitlines() if "environments" not in line]
        path.write_text("\n".join(kept))
        return run(argv, **options)

    index.add("many", "1.0", tag="cp311-cp311-manylinux_2_28_armv7l")
    index.add("many", "2.0", tag="cp311-cp311-manylinux_2_28_x86_64")
    found = locked("app", "many", indexes=asked(index), platform=ARMV7, runner=another_uv)
    assert versions(found) == {"app": "1.0", "lib": "2.0", "many": "1.0", "tool": "1.0"}


@BOTH
def test_no_wheel_of_a_dependency(index, platform):
    index.add("outer", "1.0", requires=["exotic"])
    index.add("exotic", "1.0", tag="cp311-cp311-win_amd64")
    with pytest.raises(NoWheel) as caught:
        locked("outer", indexes=asked(index), platform=platform)
    assert caught.value.package == "exotic"


WIN = "cp311-cp311-win_amd64"
SOURCE_ONLY = {
    "one version": ([("1.0", None)], "exotic"),
    "that version": ([("1.0", None)], "exotic==1.0"),
    "all versions": ([("1.0", None), ("2.0", None)], "exotic"),
    "one of all versions": ([("1.0", None), ("2.0", None)], "exotic==2.0"),
    "a range of versions": ([("1.0", None), ("2.0", None), ("3.0", None)], "exotic>=1.0,<3.0"),
    "an extra": ([("1.0", None), ("2.0", None)], "exotic[more]"),
    "wheels for another Python": ([("1.0", "cp38-cp38-manylinux_2_17_x86_64"), ("2.0", None)], "exotic"),
    "wheels for another interpreter": ([("1.0", "pp310-pypy310_pp73-any")], "exotic"),
    "wheels for another libc": ([("1.0", "cp311-cp311-musllinux_1_1_x86_64"), ("1.1", None)], "exotic"),
    "wheels for another platform, several times": ([("1.0", WIN), ("2.0", WIN), ("2.1", None)], "exotic<2.1"),
    "two ranges": ([("1.0", None), ("2.0", WIN), ("3.0", None)], "exotic!=2.0"),
}


@BOTH
@pytest.mark.parametrize("needed", ["by the model", "by another package"])
@pytest.mark.parametrize(("releases", "line"), SOURCE_ONLY.values(), ids=SOURCE_ONLY.keys())
def test_what_has_to_be_built_is_named_for_an_engine(index, platform, releases, line, needed):
    """uv says it of one version, of some, and of "all versions" in other words each."""
    for version, tag in releases:
        if tag:
            index.add("exotic", version, tag=tag)
        else:
            index.add_source("exotic", version)
    if needed == "by another package":
        index.add("outer", "1.0", requires=[line])
        line = "outer"
    with pytest.raises(NoWheel) as caught:
        locked(line, indexes=asked(index), platform=platform)
    assert (caught.value.package, caught.value.platform) == ("exotic", platform)
    assert str(caught.value).startswith(f"exotic has no wheel for {platform}")


@BOTH
@pytest.mark.parametrize("line", ["windows-api==306", "windows-api>=300", "needs-windows"])
def test_what_is_for_another_system_alone_is_no_work_for_an_engine(index, platform, line):
    index.add("windows-api", "306", tag=WIN)
    index.add("windows-api", "305", tag="cp311-cp311-win32")
    index.add("needs-windows", "1.0", requires=["windows-api>=223"])
    if line != "needs-windows":
        # Nobody asks for the version that was for every system.
        index.add("windows-api", "1.0", tag="cp35-cp35m-manylinux1_x86_64")
    with pytest.raises(NoWheel, match=f"windows-api has no wheel for {platform}") as caught:
        locked(line, indexes=asked(index), platform=platform)
    assert not caught.value.buildable
    assert caught.value.exit_code == 73
    assert "win32, win_amd64" in caught.value.what or line == "windows-api==306"
    assert "no engine can build it" in caught.value.what
    assert "sys_platform == 'win32'" in caught.value.remedy


@BOTH
@pytest.mark.parametrize("other", ["cp38-cp38-manylinux_2_17_x86_64", None], ids=["another Python's wheel", "source"])
def test_what_is_for_linux_too_may_be_work_for_an_engine(index, platform, other):
    index.add("windows-api", "306", tag=WIN)
    if other:
        index.add("windows-api", "306", tag=other)
    else:
        index.add_source("windows-api", "306")
    with pytest.raises(NoWheel) as caught:
        locked("windows-api", indexes=asked(index), platform=platform)
    assert caught.value.buildable
    assert "BUILD_ENGINE" in caught.value.remedy


@BOTH
def test_a_conflict_is_no_work_for_an_engine(index, platform):
    index.add("one", "1.0", requires=["lib<2"])
    index.add("other", "1.0", requires=["lib>=2"])
    with pytest.raises(Unsatisfiable):
        locked("one", "other", indexes=asked(index), platform=platform)


@BOTH
def test_requires_python_is_respected(index, platform):
    index.add("new", "1.0", requires_python=">=3.11")
    index.add("new", "2.0", requires_python=">=3.12")
    index.add("new", "1.5", requires_python=">=3.11.4")
    found = {
        python: versions(locked("new", indexes=asked(index), platform=platform, python=python))["new"]
        for python in ("3.11", "3.11.4", "3.12")
    }
    assert found == {"3.11": "1.0", "3.11.4": "1.5", "3.12": "2.0"}


@BOTH
def test_of_several_wheels_the_one_that_pip_takes(index, platform):
    name = {"amd64": "x86_64", "arm": "armv7l"}[platform.architecture]
    for tag in (f"cp311-cp311-manylinux2014_{name}", f"cp311-cp311-manylinux_2_28_{name}", "py3-none-any"):
        index.add("several", "1.0", tag=tag)
    for tag in (f"py3-none-manylinux2014_{name}", f"py3-none-manylinux_2_28_{name}", "py3-none-any"):
        index.add("pure", "1.0", tag=tag)
    index.add("abi3", "1.0", tag=f"cp37-abi3-manylinux2014_{name}")
    index.add("abi3", "1.0", tag=f"cp311-cp311-manylinux2014_{name}")
    found = locked("several", "pure", "abi3", indexes=asked(index), platform=platform)
    assert {wheel.filename for wheel in found.wheels} == {
        f"several-1.0-cp311-cp311-manylinux_2_28_{name}.whl",
        f"pure-1.0-py3-none-manylinux_2_28_{name}.whl",
        f"abi3-1.0-cp311-cp311-manylinux2014_{name}.whl",
    }
    old = locked("several", indexes=asked(index), platform=platform, glibc=(2, 17))
    assert [wheel.filename for wheel in old.wheels] == [f"several-1.0-cp311-cp311-manylinux2014_{name}.whl"]


def test_of_several_wheels_one_of_the_hashes_that_are_named(index):
    digest = index.add("several", "1.0", tag="py3-none-any")[1]
    index.add("several", "1.0", tag="cp311-cp311-manylinux_2_28_x86_64")
    found = locked(f"several==1.0 --hash=sha256:{digest}", indexes=asked(index))
    assert [wheel.filename for wheel in found.wheels] == ["several-1.0-py3-none-any.whl"]


# What cannot be fulfilled.


@BOTH
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("lib==9",), "lib"),
        (("nothing-of-the-kind",), "nothing-of-the-kind"),
        (("app", "lib<1"), "lib"),
        (("lib==1.0", "lib==2.0"), "lib"),
        (("app", "other"), "lib"),
    ],
)
def test_conflicts_are_explained(index, platform, lines, said):
    index.add("other", "1.0", requires=["lib<1"])
    with pytest.raises(Unsatisfiable, match=said) as caught:
        locked(*lines, indexes=asked(index), platform=platform)
    assert caught.value.exit_code == 65
    assert "hint" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolving_without_a_python_version_is_refused(index):
    with pytest.raises(InvalidVersion, match="which Python version"):
        locked("app", indexes=asked(index), python="")


def test_nothing_to_install_needs_no_resolver(index):
    assert locked(indexes=asked(index)).wheels == ()
    assert not index.requests


# As of.


@BOTH
def test_as_of_the_day_s_beginning(index, platform):
    found = locked("app", indexes=asked(index), platform=platform, as_of=NOON)
    assert versions(found)["lib"] == "1.0"
    assert found.as_of == datetime(2024, 6, 1, tzinfo=UTC)
    assert found.as_of_enforced
    assert versions(locked("app", indexes=asked(index), platform=platform))["lib"] == "2.0"


@BOTH
def test_as_of_the_moment_where_the_day_s_beginning_is_too_early(index, platform):
    found = locked("app", "lib==1.1", indexes=asked(index), platform=platform, as_of=NOON)
    assert versions(found)["lib"] == "1.1"
    assert found.as_of == NOON
    with pytest.raises(Unsatisfiable):
        locked("app", "lib==2.0", indexes=asked(index), platform=platform, as_of=NOON)


@BOTH
@pytest.mark.parametrize("json_pages", [True, False])
def test_an_index_without_upload_times_is_exempt(index, platform, json_pages):
    index.times, index.json = False, json_pages
    found = locked("app", indexes=asked(index), platform=platform, as_of=NOON)
    assert versions(found)["lib"] == "2.0"
    assert not found.as_of_enforced
    assert "as of: not enforced for app, lib" in found.note
    assert Lock.from_text(found.to_text()) == found


@BOTH
def test_only_the_index_without_times_is_exempt(index, platform):
    with running(times=False) as private:
        private.add("inhouse", "3.0", requires=["lib"])
        indexes = asked(index, extra=(IndexUrl(private.simple),))
        found = locked("inhouse", indexes=indexes, platform=platform, as_of=NOON)
    assert versions(found) == {"inhouse": "3.0", "lib": "1.0"}
    assert found.exempt == ("inhouse",)


def test_resolutions_that_all_lack_upload_times_end_with_the_reason(index, monkeypatch):
    monkeypatch.setattr("builder.wheels.resolve._MOST_ROUNDS", 1)
    index.times = False
    with pytest.raises(BuildFailed, match="upload times") as caught:
        locked("app", indexes=asked(index), as_of=NOON)
    assert not isinstance(caught.value, NoWheel)


@BOTH
def test_an_index_without_hashes(index, platform):
    index.json, index.hashes = False, False
    found = locked("lib", indexes=asked(index), platform=platform)
    assert found.wheels[0].sha256 == index.add("lib", "2.0")[1]


# Several indexes, credentials, authorities.


@BOTH
def test_a_public_package_does_not_shadow_a_private_one(index, platform):
    index.add("inhouse", "99.0")
    with running() as private:
        private.add("inhouse", "1.0")
        both = asked(index, extra=(IndexUrl(private.simple),))
        assert versions(locked("inhouse", indexes=both, platform=platform)) == {"inhouse": "1.0"}
        anyhow = asked(index, extra=(IndexUrl(private.simple),), strategy="unsafe-best-match")
        assert versions(locked("inhouse", indexes=anyhow, platform=platform)) == {"inhouse": "99.0"}


@BOTH
def test_a_private_index_with_a_credential_under_its_own_authority(tmp_path, platform):
    authority = self_signed(tmp_path, "index authority")
    with running(certificate=for_loopback(tmp_path, authority), credential=("me", "s3cret/w@rd")) as index:
        index.add("inhouse", "1.0")
        seen = []

        def watched(argv, **options):
            seen.append(json.dumps([list(argv), dict(options["env"])]))
            return run(argv, **options)

        def indexes(password, bundle=authority.path):
            return Indexes(default=IndexUrl(index.simple, "me", password), ca_bundle=bundle)

        found = locked("inhouse", indexes=indexes("s3cret/w@rd"), platform=platform, runner=watched)
        assert versions(found) == {"inhouse": "1.0"}
        assert "cret" not in found.to_text() + repr(found) + "".join(seen)
        with pytest.raises(PermissionRefused, match=r"401|credential") as caught:
            locked("inhouse", indexes=indexes("wr0ng-w@rd"), platform=platform)
        assert "wr0ng" not in str(caught.value)
        other = self_signed(tmp_path / "other", "another authority")
        with pytest.raises(InvalidSettings, match="SSL_CERT_FILE"):
            locked("inhouse", indexes=indexes("s3cret/w@rd", other.path), platform=platform)


def test_a_credential_in_netrc(index, tmp_path):
    index.credential = ("me", "netrc-secret")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password netrc-secret\n")
    assert versions(locked("lib", indexes=asked(index, netrc=tmp_path / "netrc"))) == {"lib": "2.0"}


def test_an_index_that_a_model_names_is_asked_first(index):
    with running() as theirs:
        theirs.add("lib", "7.0+cpu")
        requirements = Requirements(required=Requirements.of("lib").required, indexes=(theirs.simple,))
        found = locked(requirements, indexes=asked(index))
        assert versions(found) == {"lib": "7.0+cpu"}
        assert found.wheels[0].filename == "lib-7.0+cpu-py3-none-any.whl"


def test_folders_of_wheels_alone(tmp_path):
    name, content = make_wheel("linked", "1.0")
    (tmp_path / name).write_bytes(content)
    indexes = Indexes(no_index=True, find_links=(IndexUrl(tmp_path.as_uri()),))
    for platform in (AMD64, ARMV7):
        found = locked("linked", indexes=indexes, platform=platform)
        assert versions(found) == {"linked": "1.0"}
        with IndexClient(indexes) as client:
            client.download(Lock.from_text(found.to_text()).wheels[0], tmp_path / f"copy-{platform.architecture}")


@BOTH
def test_an_unavailable_index_is_a_service_error(index, platform):
    index.faults = lambda handler, path: handler.answer(503) or True

    def impatient(argv, **options):
        return run(argv, **{**options, "env": {**options["env"], "UV_HTTP_RETRIES": "0"}})

    indexes = asked(index)
    with IndexClient(indexes, policy=QUICK) as client, pytest.raises(ServiceUnavailable, match="503"):
        locked("lib", indexes=indexes, platform=platform, runner=impatient, client=client)


# What a model brings itself.


@BOTH
def test_wheels_of_the_model_and_of_an_address(index, tmp_path, platform):
    name, content = make_wheel("ours", "1.0", requires=["lib"])
    (tmp_path / "model/wheels").mkdir(parents=True)
    (tmp_path / "model/wheels" / name).write_bytes(content)
    (tmp_path / "model/requirements.txt").write_text(f"./wheels/{name}\n")
    requirements = Requirements.read(tmp_path, "model")
    address = f"{index.url}/files/tool/tool-1.0-py3-none-any.whl"
    tool = Requirements.of("tool").required[0]
    requirements = requirements.with_changes(required=(*requirements.required, replace(tool, url=address)))
    found = locked(requirements, indexes=asked(index), model=tmp_path / "model", platform=platform, as_of=NOON)
    assert {wheel.name: wheel.origin for wheel in found.wheels} == {"lib": "index", "ours": "model", "tool": "address"}
    assert found.as_of_enforced
    kept = Lock.from_text(found.to_text()).located(requirements, tmp_path / "model")
    assert kept == found
    with IndexClient(asked(index)) as client:
        for wheel in kept.wheels:
            client.download(wheel, tmp_path / wheel.filename)
    assert (tmp_path / name).read_bytes() == content


@BOTH
def test_a_model_s_wheel_for_another_platform(index, tmp_path, platform):
    name, content = make_wheel("ours", "1.0", tag="cp311-cp311-manylinux2014_ppc64le")
    (tmp_path / name).write_bytes(content)
    (tmp_path / "requirements.txt").write_text(f"./{name}")
    requirements = Requirements.read(tmp_path.parent, tmp_path.name)
    with pytest.raises(NoWheel) as caught:
        locked(requirements, indexes=asked(index), model=tmp_path, platform=platform)
    assert caught.value.package == "ours"


# What a wheel that is the model's own, or its author's, asks for by an address.


def model_of(folder, *lines, **wheels):
    (folder / "model").mkdir()
    for name, requires in wheels.items():
        filename, content = make_wheel(name, "1.0", requires=requires)
        (folder / "model" / filename).write_bytes(content)
        lines = (*lines, f"./{filename}")
    (folder / "model/requirements.txt").write_text("\n".join(lines))
    return Requirements.read(folder, "model")


def source_that_writes(folder, marker):
    """Return the archive of a package whose build writes a file: pip runs it to learn what the package requires."""
    source = folder / "evil-1.0"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (source / "backend.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    archive = folder / "evil-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(source, source.name)
    return archive


@BOTH
@pytest.mark.parametrize("form", ["evil @ {}", "evil @ {} ; python_version > '3'", "evil@{}"])
def test_what_a_model_s_wheel_requires_is_not_built(index, tmp_path, platform, form):
    archive = source_that_writes(tmp_path, tmp_path / "built")
    requirements = model_of(tmp_path, front=[form.format(archive.as_uri())])
    with pytest.raises(InvalidVersion, match=r"front-1\.0-py3-none-any\.whl requires.*evil.*address") as caught:
        locked(requirements, indexes=asked(index), model=tmp_path / "model", platform=platform)
    assert "requirements.txt" in caught.value.remedy
    assert not (tmp_path / "built").exists()


@BOTH
def test_no_address_is_asked_because_a_model_s_wheel_names_it(index, tmp_path, platform):
    before = list(index.requests)
    requirements = model_of(tmp_path, front=[f"tool @ {index.url}/files/tool/tool-1.0-py3-none-any.whl"])
    with pytest.raises(InvalidVersion, match="address"):
        locked(requirements, indexes=asked(index), model=tmp_path / "model", platform=platform)
    assert index.requests == before


@BOTH
@pytest.mark.parametrize("kind", ["wheel", "source"])
def test_what_the_wheel_of_an_address_names_is_neither_taken_nor_built(index, tmp_path, platform, kind):
    name, content = make_wheel("behind", "1.0")
    (tmp_path / name).write_bytes(content)
    place = tmp_path / name if kind == "wheel" else source_that_writes(tmp_path, tmp_path / "built")
    required = "behind" if kind == "wheel" else "evil"
    index.add("front", "1.0", requires=[f"{required} @ {place.as_uri()}"])
    (front,) = Requirements.of("front").required
    address = f"{index.url}/files/front/front-1.0-py3-none-any.whl"
    requirements = Requirements.of("lib").with_changes(required=(replace(front, url=address),))
    with pytest.raises((InvalidVersion, BuildFailed), match=r"address|disabled"):
        locked(requirements, indexes=asked(index), model=tmp_path, platform=platform)
    assert not (tmp_path / "built").exists()


@BOTH
def test_hashes_are_kept_to(index, platform):
    right, wrong = index.add("lib", "2.0")[1], "0" * 64
    line = "lib==2.0 --hash=sha256:{}"
    assert versions(locked(line.format(right), indexes=asked(index), platform=platform)) == {"lib": "2.0"}
    with pytest.raises(InvalidVersion, match="do not name"):
        locked(line.format(wrong), indexes=asked(index), platform=platform)
    with pytest.raises(InvalidVersion, match=r"lib-2\.0.*do not name"):
        locked(
            "--require-hashes",
            f"app==1.0 --hash=sha256:{index.add('app', '1.0', requires=['lib'])[1]}",
            indexes=asked(index),
            platform=platform,
        )


def test_pre_releases_only_where_they_are_asked_for(index):
    index.add("lib", "3.0rc1")
    assert versions(locked("lib", indexes=asked(index))) == {"lib": "2.0"}
    assert versions(locked("--pre", "lib", indexes=asked(index))) == {"lib": "3.0rc1"}


def test_the_whole_of_mlflow_where_there_is_no_skinny_one(index):
    for name, requires in (("mlflow", ["numpy"]), ("numpy", []), ("pandas", ["numpy"]), ("uvicorn", [])):
        index.add(name, "3.1.0" if name == "mlflow" else "1.0", requires=requires)
    lean = for_serving(Requirements.of("mlflow==3.1.0"))
    assert set(versions(locked(lean, indexes=asked(index)))) == {"mlflow", "numpy"}
    index.add("mlflow-skinny", "3.1.0")
    assert set(versions(locked(lean, indexes=asked(index)))) == {
        "mlflow-skinny",
        "numpy",
        "pandas",
        "uvicorn",
    }


# The resolvers' processes.


def test_a_resolver_that_takes_too_long(index):
    with pytest.raises(BuildFailed, match="longer than"):
        locked("lib", indexes=asked(index), timeout=0.001)


@BOTH
def test_what_a_resolver_writes_is_checked(index, platform):
    def lying(argv, **options):
        code = run(argv, **options)
        path = Path(argv[argv.index("--output-file") + 1])
        path.write_text(path.read_text().replace("lib-2.0-py3", "lib-3.0-py3"))
        return code

    with pytest.raises(BuildFailed, match="cannot be read"):
        locked("lib", indexes=asked(index), platform=platform, runner=lying)


def test_the_folder_of_a_resolution_is_private_and_goes():
    with private_folder() as folder:
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()


@BOTH
def test_no_settings_of_the_machine_are_read(index, tmp_path, monkeypatch, platform):
    """uv would read them from a home, and from where XDG_CONFIG_DIRS points."""
    for folder in (tmp_path / "uv", tmp_path / ".config/uv"):
        folder.mkdir(parents=True)
        (folder / "uv.toml").write_text("no-index = true\n")
    for name, path in {"HOME": tmp_path, "XDG_CONFIG_HOME": tmp_path / ".config", "XDG_CONFIG_DIRS": tmp_path}.items():
        monkeypatch.setenv(name, str(path))
    seen = []

    def reading(argv, **options):
        (folder,) = {options["env"][name] for name in ("HOME", "XDG_CONFIG_DIRS")}
        seen.append((folder == str(options["cwd"]), (Path(folder) / "uv/uv.toml").read_text()))
        assert "XDG_CONFIG_HOME" not in options["env"]
        return run(argv, **options)

    assert versions(locked("lib", indexes=asked(index), platform=platform, runner=reading)) == {"lib": "2.0"}
    assert seen == [(True, "")]


def test_the_built_in_index_is_uv_s():
    help_text = subprocess.run(
        [find_uv_bin(), "pip", "compile", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert built_in_index().url in help_text


def test_uv_s_file_names_the_indexes_in_order(index):
    written = {}

    def reading(argv, **options):
        path = options["cwd"] / "pyproject.toml"
        written.update(tomllib.loads(path.read_text())["tool"]["uv"], mode=path.stat().st_mode & 0o777)
        return run(argv, **options)

    indexes = asked(index, extra=(IndexUrl(index.simple.replace("/simple", "/none")),))
    locked("lib", indexes=indexes, runner=reading)
    assert [entry["url"] for entry in written["index"]] == [f"{index.url}/none", index.simple]
    assert written["mode"] == 0o600

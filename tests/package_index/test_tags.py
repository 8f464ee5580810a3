"""Which wheels fit which platform."""

import pytest
from packaging.markers import Marker
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from builder.dockerfile.engine import machine_platform
from builder.errors import InvalidVersion
from builder.package_index.wheel_file import marker_environment, rank_of, wheel_platforms, wheel_tags
from builder.reference import Platform

AMD64, ARM64, ARMV7 = (Platform.parse(text) for text in ("linux/amd64", "linux/arm64", "linux/arm/v7"))


@pytest.mark.parametrize(
    ("platform", "glibc", "wheel", "fits"),
    [
        (AMD64, (2, 36), "x-1-cp311-cp311-manylinux_2_36_x86_64.whl", True),
        (AMD64, (2, 31), "x-1-cp311-cp311-manylinux_2_36_x86_64.whl", False),
        (AMD64, (2, 36), "x-1-cp311-cp311-manylinux1_x86_64.manylinux_2_5_x86_64.whl", True),
        (AMD64, (2, 36), "x-1-cp38-abi3-manylinux2014_x86_64.whl", True),
        (AMD64, (2, 36), "x-1-cp312-cp312-manylinux2014_x86_64.whl", False),
        (AMD64, (2, 36), "x-1-cp312-abi3-manylinux2014_x86_64.whl", False),
        (AMD64, (2, 36), "x-1-cp311-cp311-musllinux_1_2_x86_64.whl", False),
        (AMD64, (2, 36), "x-1-py3-none-linux_x86_64.whl", True),
        (AMD64, (2, 36), "x-1-py2.py3-none-any.whl", True),
        (AMD64, (2, 36), "x-1-py312-none-any.whl", False),
        (AMD64, None, "x-1-cp311-cp311-manylinux_2_28_x86_64.whl", True),
        (AMD64, None, "x-1-cp311-cp311-manylinux_2_29_x86_64.whl", False),
        (ARM64, (2, 36), "x-1-cp311-cp311-manylinux2014_aarch64.whl", True),
        (ARM64, (2, 36), "x-1-cp311-cp311-manylinux_2_5_aarch64.whl", False),
        (ARM64, (2, 36), "x-1-cp311-cp311-manylinux2014_x86_64.whl", False),
        (ARMV7, (2, 36), "x-1-cp311-cp311-manylinux_2_31_armv7l.whl", True),
        (ARMV7, (2, 36), "x-1-cp311-cp311-linux_armv7l.whl", True),
        (ARMV7, (2, 36), "x-1-cp311-cp311-linux_armv6l.whl", False),
        (Platform.parse("linux/s390x"), (2, 36), "x-1-cp311-cp311-manylinux2014_s390x.whl", True),
        (Platform.parse("linux/amd64/v3"), (2, 36), "x-1-cp311-cp311-manylinux2014_x86_64.whl", True),
    ],
)
def test_wheels(platform, glibc, wheel, fits):
    assert (rank_of(parse_wheel_filename(wheel)[3], wheel_tags(platform, "3.11.2", glibc)) is not None) is fits


def test_this_machine_s_own_wheels_fit_it():
    glibc = next(tag.platform.split("_")[1:3] for tag in sys_tags() if tag.platform.startswith("manylinux_"))
    ours = wheel_tags(machine_platform(), "3.11", (int(glibc[0]), int(glibc[1])))
    theirs = {tag for tag in sys_tags() if tag.interpreter.startswith(("cp311", "py3")) and "cp311" in str(tag)}
    assert theirs <= ours.keys()


@pytest.mark.parametrize(
    ("python", "abi", "fits"),
    [("3.7", "cp37m", True), ("3.7.9", "cp37m", True), ("3.8", "cp38", True), ("3.8", "cp38m", False)],
)
def test_the_abi_of_an_old_python_has_an_m(python, abi, fits):
    tags = parse_wheel_filename(f"x-1-{abi[:4]}-{abi}-manylinux2014_x86_64.whl")[3]
    assert (rank_of(tags, wheel_tags(Platform.parse("linux/amd64"), python, (2, 31))) is not None) is fits


def test_the_best_come_first():
    assert wheel_platforms(ARMV7, (2, 18)) == [
        "manylinux_2_18_armv7l",
        "manylinux_2_17_armv7l",
        "manylinux2014_armv7l",
        "linux_armv7l",
    ]


@pytest.mark.parametrize("text", ["windows/amd64", "linux/wasm", "linux/arm/v5", "darwin/arm64"])
def test_platforms_without_wheels(text):
    with pytest.raises(InvalidVersion, match=text):
        wheel_tags(Platform.parse(text), "3.11", None)


@pytest.mark.parametrize(
    ("marker", "value"),
    [
        ('platform_machine == "armv7l"', True),
        ('platform_machine == "x86_64"', False),
        ('python_version < "3.10"', False),
        ('python_full_version >= "3.11.0"', True),
        ('sys_platform == "win32"', False),
        ('implementation_name == "cpython" and os_name == "posix"', True),
    ],
)
def test_markers(marker, value):
    environment = marker_environment(ARMV7, "3.11")
    assert Marker(marker).evaluate({**environment}) is value
    assert set(environment) == set(marker_environment(AMD64, "3.12.1"))

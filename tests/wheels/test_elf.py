"""What is read of shared libraries: real ones, all forms of the format, and files that lie."""

import io
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import lightgbm
import numpy as np
import pytest
import sklearn
from hypothesis import given
from hypothesis import strategies as st

from builder.wheels.shared_libraries import Elf, parts_of, read_elf
from tests.wheels.elf import AMD64, ARM64, S390X, make_elf

ORDINARY = make_elf("libGL.so.1", "libother-1f2e.so", soname="libown.so.3", module="own")


def read(content, module="own"):
    return read_elf(io.BytesIO(content), module)


@pytest.mark.parametrize(
    ("bits", "order", "machine"), [(64, "<", ARM64), (64, ">", S390X), (32, "<", 40), (32, ">", 20)]
)
def test_both_word_sizes_and_byte_orders_are_read(bits, order, machine):
    names = ("libGL.so.1", "libz.so.1", "libGL.so.1")
    content = make_elf(
        *names, soname="libown.so.3", module="own", bits=bits, order=order, machine=machine, padding=9000
    )
    assert read(content) == Elf(machine=machine, soname="libown.so.3", needed=names[:2], importable=True)
    assert read(content, "other") == Elf(machine=machine, soname="libown.so.3", needed=names[:2], importable=False)


def test_a_long_name_table_is_looked_through():
    content = make_elf(*(f"lib{number:0200}.so" for number in range(256)), module="own")
    # The word lies across the places where the table is cut into pieces.
    table = content.index(b"\0lib") + 1
    for start in range((1 << 20) - 12, (1 << 20) + 2):
        longer = content.replace(b"PyInit_own", b"P" * (start - (content.index(b"PyInit_own") - table)) + b"PyInit_own")
        size = struct.pack("<qQ", 10, len(content) - table + 1)
        assert read(longer.replace(size, struct.pack("<qQ", 10, len(longer) - table + 1))).importable


@pytest.mark.skipif(sys.platform != "linux", reason="reads this machine's libraries")
def test_real_libraries():
    with next(Path(lightgbm.__file__).parent.rglob("lib_lightgbm.so")).open("rb") as file:
        found = read_elf(file, "lib_lightgbm")
    assert {"libgomp.so.1", "libc.so.6"} < set(found.needed)
    assert not found.importable
    extensions = [*Path(sklearn.__file__).parent.rglob("*.so"), *Path(np.__file__).parent.glob("_core/*.so")]
    assert len(extensions) > 20
    names = set()
    for path in extensions:
        with path.open("rb") as file:
            found = read_elf(file, path.name.partition(".")[0])
        assert found.importable
        names.update(found.needed)
        if shutil.which("readelf"):
            said = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
            assert [line.partition("[")[2][:-1] for line in said.splitlines() if "(NEEDED)" in line] == list(
                found.needed
            )
    assert {"libc.so.6", "libm.so.6"} < names


NO_LIBRARY = {
    "nothing": b"",
    "a script": b"#!/bin/sh\n" + bytes(100),
    "a linker's script": b"INPUT(-lGL)",
    "only its mark": b"\x7fELF",
    "no such class": b"\x7fELF\x09\x01" + ORDINARY[6:],
    "no such order": b"\x7fELF\x02\x09" + ORDINARY[6:],
    "an object file": ORDINARY[:16] + b"\x01\0" + ORDINARY[18:],
    "too many headers": ORDINARY[:56] + b"\xff\xff" + ORDINARY[58:],
    "no headers": ORDINARY[:56] + b"\0\0" + ORDINARY[58:],
    "headers behind its end": ORDINARY[:32] + struct.pack("<Q", 1 << 40) + ORDINARY[40:],
    "headers further than a file can be": ORDINARY[:32] + struct.pack("<Q", (1 << 64) - 1) + ORDINARY[40:],
    "headers further than a file can be sought": ORDINARY[:32] + struct.pack("<Q", 1 << 63) + ORDINARY[40:],
    "headers of another size": ORDINARY[:54] + b"\x01\0" + ORDINARY[56:],
}


@pytest.mark.parametrize("content", NO_LIBRARY.values(), ids=NO_LIBRARY.keys())
def test_another_file_is_not_a_library(content):
    assert read(content) is None
    assert sum(map(len, parts_of(content, len(content)))) <= 112 << 20


def test_names_that_are_no_file_names_are_left_out():
    odd = ("../libup.so", "/abs/lib.so", "lib\x1b[31m.so", "a b", "x" * 256, "ü.so")
    assert read(make_elf(*odd, "libz.so.1")).needed == ("libz.so.1",)
    assert read(make_elf(soname="../x")).soname == ""


def test_a_library_with_large_declared_sizes_is_cheap():
    count = 100_000
    entries = struct.pack("<qQ", 1, 1) * count
    head = bytearray(ORDINARY)
    dynamic = 64 + 2 * 56
    # The dynamic section is all entries that need something, and it says that its name table has no end.
    struct.pack_into("<IIQQQQQQ", head, 64 + 56, 2, 4, dynamic, 0, 0, 1 << 62, 1 << 62, 8)
    content = bytes(head[:dynamic]) + struct.pack("<qQqQ", 5, 0x10000, 10, (1 << 63) - 1) + entries
    tracemalloc.start()
    found = read(content)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == Elf(machine=AMD64, soname="", needed=found.needed, importable=False)
    assert len(found.needed) <= 1
    assert most < 8 << 20


@given(st.integers(0, len(ORDINARY) - 1), st.integers(0, 255), st.integers(0, len(ORDINARY)))
def test_a_damaged_library_never_raises(place, byte, end):
    damaged = bytearray(ORDINARY)
    damaged[place] = byte
    for content in (bytes(damaged), ORDINARY[:end], bytes(damaged[:end])):
        found = read(content)
        assert found is None or isinstance(found, Elf)
        assert sum(map(len, parts_of(content, 1 << 40))) <= (112 << 20) + 4096 * 16

"""One wheel, one layer: what is refused, what is not, and what comes out."""

from __future__ import annotations

import csv
import io
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from builder.errors import ExitCode
from builder.oci.layer import stored
from builder.reference import Reference
from builder.wheels.install import WheelLayer, layer_key
from builder.wheels.wheel import InvalidWheel, open_wheel
from builder.wheels.zip import BadArchive, read_directory
from tests.wheels.made import (
    INFO,
    METADATA,
    NAME,
    PYTHON,
    SITE,
    WHEEL,
    built,
    central,
    compiler,
    digest,
    local,
    make,
    put,
    unpacked,
)

MODULE = b"VALUE = 1\n" * 100
FILES = {"demo/__init__.py": MODULE}
BOTH = ("demo/__init__.py", "demo/b.py")


def _patch_both(name, field, form, value):
    """Change a field in a member's own header and in the directory; offsets differ by two from the version on."""

    def patch(data):
        put(data, local(data, name) + field, form, value)
        put(data, central(data, name) + field + 2, form, value)

    return patch


def _patch_sizes(name, change):
    """Declare a size of the content that is wrong by so many bytes, everywhere, RECORD included."""

    def patch(data):
        put(data, local(data, name) + 22, "I", len(MODULE) + change)
        put(data, central(data, name) + 24, "I", len(MODULE) + change)

    def rows(listed):
        listed[name] = (listed[name][0], "")

    return {"files": FILES, "patch": patch, "rows": rows}


def _rename(old, new):
    def patch(data):
        return data.replace(old, new)

    return patch


def _after(name, junk):
    """Put bytes behind a member's, as if they belonged to it."""

    def patch(data):
        start = local(data, name)
        (compressed,) = struct.unpack_from("<I", data, start + 18)
        put(data, start + 18, "I", compressed + len(junk))
        put(data, central(data, name) + 20, "I", compressed + len(junk))
        return _inserted(data, start + 30 + len(name) + compressed, junk)

    return patch


def _inserted(data, position, junk):
    """Insert bytes among the members, and correct what stands behind them."""
    for name in zipfile.ZipFile(io.BytesIO(bytes(data))).NameToInfo:
        header = central(data, name)
        (offset,) = struct.unpack_from("<I", data, header + 42)
        if offset >= position:
            put(data, header + 42, "I", offset + len(junk))
    end = len(data) - 22
    (directory,) = struct.unpack_from("<I", data, end + 16)
    put(data, end + 16, "I", directory + len(junk))
    data[position:position] = junk
    return data


def _overlap(data):
    """Let two names share the bytes of one member."""
    put(data, central(data, BOTH[1]) + 42, "I", struct.unpack_from("<I", data, central(data, BOTH[0]) + 42)[0])


def _cut_stream(data):
    """Take a member's last byte away, and say so."""
    name = "demo/__init__.py"
    start = local(data, name)
    (compressed,) = struct.unpack_from("<I", data, start + 18)
    put(data, start + 18, "I", compressed - 1)
    put(data, central(data, name) + 20, "I", compressed - 1)
    last = start + 30 + len(name) + compressed - 1
    _inserted(data, last + 1, b"")
    for other in zipfile.ZipFile(io.BytesIO(bytes(data))).NameToInfo:
        header = central(data, other)
        (offset,) = struct.unpack_from("<I", data, header + 42)
        if offset > start:
            put(data, header + 42, "I", offset - 1)
    end = len(data) - 22
    put(data, end + 16, "I", struct.unpack_from("<I", data, end + 16)[0] - 1)
    del data[last]


def _lies(data):
    """Say that a member is stored, where it is deflated."""
    for position in (local(data, "demo/__init__.py") + 8, central(data, "demo/__init__.py") + 10):
        put(data, position, "H", 0)


def _extra(data):
    """Give a member another name in an extra field of the directory."""
    header = central(data, "demo/__init__.py")
    field = struct.pack("<HHBI", 0x7075, 5 + 4, 1, 0) + b"evil"
    put(data, header + 30, "H", len(field))
    data[header + 46 + len("demo/__init__.py") : header + 46 + len("demo/__init__.py")] = field
    end = len(data) - 22
    put(data, end + 12, "I", struct.unpack_from("<I", data, end + 12)[0] + len(field))


def _rows_of(name, value):
    return lambda listed: listed.update({name: value})


def _scripts(text):
    return {"files": {**FILES, f"{INFO}/entry_points.txt": text.encode()}}


HOSTILE = {
    "absolute path": ({"files": {"/etc/passwd": b""}}, "absolute"),
    "parent": ({"files": {"../evil.py": b""}}, "'..'"),
    "parent within": ({"files": {"demo/../../evil.py": b""}}, "'..'"),
    "parent at the end": ({"files": {"demo/..": b""}}, "'..'"),
    "parent in data": ({"files": {"demo-1.0.data/data/../../../evil": b""}}, "'..'"),
    "dot": ({"files": {"demo/./evil.py": b""}}, "'.'"),
    "empty part": ({"files": {"demo//evil.py": b""}}, "empty part"),
    "backslash": ({"files": {"demo\\evil.py": b""}}, "backslash"),
    "newline": ({"files": {"demo/a\nb": b""}}, "control character"),
    "long name": ({"files": {"demo/" + "x" * 256: b""}}, "too long"),
    "deep path": ({"files": {"/".join("x" * 65): b""}}, "too deep"),
    "whiteout": ({"files": {".wh.numpy": b""}}, "another layer"),
    "opaque whiteout": ({"files": {"numpy/.wh..wh..opq": b""}}, "another layer"),
    "whiteout in data": ({"files": {"demo-1.0.data/data/.wh.bin": b""}}, "another layer"),
    "symbolic link": ({"files": {"demo/a": b"/etc/shadow"}, "modes": {"demo/a": 0o120777}}, "link"),
    "named pipe": ({"files": {"demo/a": b""}, "modes": {"demo/a": 0o010644}}, "link, a device"),
    "file as directory": ({"files": {"demo/a": b""}, "modes": {"demo/a": 0o040755}}, "link, a device"),
    "directory with content": ({"files": {"demo/": b"x"}}, "directory with content"),
    "file and directory": ({"files": {"demo": b"", "demo/a.py": b""}}, "file and a directory"),
    "encrypted": ({"files": FILES, "patch": _patch_both(BOTH[0], 6, "H", 1)}, "encrypted"),
    "strange flag": ({"files": FILES, "patch": _patch_both(BOTH[0], 6, "H", 0x20)}, "flags"),
    "bzip2": ({"files": FILES, "methods": {BOTH[0]: zipfile.ZIP_BZIP2}}, "method 12"),
    "lzma": ({"files": FILES, "methods": {BOTH[0]: zipfile.ZIP_LZMA}}, "flags|method 14"),
    "wrong CRC": ({"files": FILES, "patch": _patch_both(BOTH[0], 14, "I", 7)}, "CRC-32"),
    "size too small": (_patch_sizes(BOTH[0], -1), "more than the 999 bytes"),
    "size much too small": (_patch_sizes(BOTH[0], -900), "more than the 100 bytes"),
    "size too large": (_patch_sizes(BOTH[0], 1), "holds 1000 bytes, and 1001"),
    "garbage behind the stream": ({"files": FILES, "patch": _after(BOTH[0], b"junk")}, "follow the end"),
    "stream cut off": ({"files": FILES, "patch": _cut_stream}, "cut off"),
    "stored, it says": ({"files": FILES, "patch": _lies}, "two sizes differ"),
    "one name in the header": (
        {"files": FILES, "patch": lambda data: put(data, local(data, BOTH[0]) + 30, "B", ord("x"))},
        "local header of .* disagrees",
    ),
    "one CRC in the header": (
        {"files": FILES, "patch": lambda data: put(data, local(data, BOTH[0]) + 14, "I", 7)},
        "local header of .* disagrees",
    ),
    "one method in the header": (
        {"files": FILES, "patch": lambda data: put(data, local(data, BOTH[0]) + 8, "H", 0)},
        "local header of .* disagrees",
    ),
    "overlap": ({"files": {BOTH[0]: MODULE, BOTH[1]: MODULE}, "patch": _overlap}, "overlaps"),
    "overlap before a descriptor": (
        {"files": FILES, "streamed": True, "patch": lambda data: put(data, central(data, BOTH[0]) + 20, "I", 200)},
        "not followed",
    ),
    "another name in a field": ({"files": FILES, "patch": _extra}, "another name"),
    "twice the same": (
        {"files": {"demo/a.py": b"1", "demo/b.py": b"2"}, "patch": _rename(b"demo/b.py", b"demo/a.py")},
        "twice",
    ),
    "before": ({"files": FILES, "patch": lambda data: b"#!/bin/sh\n" + data}, "before, behind or between"),
    "behind": ({"files": FILES, "patch": lambda data: data + b"x"}, "end record"),
    "comment": (
        {"files": FILES, "patch": lambda data: data[:-2] + b"\x04\x00PK\x05\x06"},
        "end record",
    ),
    "between": (
        {"files": FILES, "patch": lambda data: _inserted(data, local(data, f"{INFO}/RECORD"), b"hidden")},
        "not followed",
    ),
    "several disks": (
        {"files": FILES, "patch": lambda data: put(data, len(data) - 22 + 4, "HH", 1, 1)},
        "several",
    ),
    "a disk of its own": (
        {"files": FILES, "patch": lambda data: put(data, central(data, BOTH[0]) + 34, "H", 1)},
        "several",
    ),
    "fewer entries": (
        {"files": FILES, "patch": lambda data: put(data, len(data) - 22 + 8, "HH", 3, 3)},
        "another size",
    ),
    "more entries": (
        {"files": FILES, "patch": lambda data: put(data, len(data) - 22 + 8, "HH", 5, 5)},
        "other members",
    ),
    "a last entry that goes on behind the directory": (
        {"files": FILES, "patch": lambda data: put(data, central(data, f"{INFO}/RECORD") + 32, "H", 1)},
        "directory is cut off",
    ),
    "directory of lies": (
        {"files": FILES, "patch": lambda data: put(data, len(data) - 22 + 12, "I", 1 << 30)},
        "before, behind or between",
    ),
    "no archive": ({"patch": lambda _data: b"x" * 1000}, "end record"),
    "too short": ({"patch": lambda _data: b"PK"}, "too short"),
    "name that is no UTF-8": (
        {"files": {"demo/é.py": b""}, "patch": _rename("é".encode(), b"\xff\xff")},
        "not UTF-8",
    ),
    "no hash": ({"files": FILES, "rows": _rows_of(BOTH[0], ("", ""))}, "no hash"),
    "weak hash": ({"files": FILES, "rows": _rows_of(BOTH[0], (digest(MODULE, "md5"), "1000"))}, "weak hash"),
    "unknown hash": ({"files": FILES, "rows": _rows_of(BOTH[0], ("sha0=AAAA", "1000"))}, "cannot be read"),
    "not listed": ({"unlisted": {"demo/evil.py": b""}}, "no hash of 'demo/evil.py'"),
    "RECORD of two columns": ({"unlisted": {f"{INFO}/RECORD": b"demo/__init__.py,\n"}}, "cannot be read"),
    "RECORD with a size of words": (
        {"unlisted": {f"{INFO}/RECORD": b"a,,many\n"}},
        "cannot be read",
    ),
    "RECORD that is no text": ({"unlisted": {f"{INFO}/RECORD": b"\xff\xfe"}}, "not UTF-8"),
    "listed twice": ({"files": FILES, "rows": lambda rows: rows.update({'a",,\n"a': ("", "")})}, "twice"),
    "no metadata": ({"files": {f"{INFO}/METADATA": None}}, "has no demo-1.0.dist-info/METADATA"),
    "no WHEEL": ({"files": {f"{INFO}/WHEEL": None}}, "has no demo-1.0.dist-info/WHEEL"),
    "other metadata": (
        {"files": {f"{INFO}/METADATA": METADATA.replace(b"demo", b"numpy")}},
        "names numpy 1.0",
    ),
    "another version's metadata": (
        {"files": {f"{INFO}/METADATA": METADATA.replace(b"1.0", b"2.0")}},
        "names demo 2.0",
    ),
    "metadata without a name": ({"files": {f"{INFO}/METADATA": b"hello"}}, "names None"),
    "format of the future": (
        {"files": {f"{INFO}/WHEEL": WHEEL.replace(b"1.0", b"2.0")}},
        "version 2.0",
    ),
    "two distributions": ({"files": {"other-1.0.dist-info/METADATA": b""}}, "2 .dist-info"),
    "another distribution": ({"name": "other-1.0-py3-none-any.whl"}, "another distribution"),
    "another version": ({"name": "demo-1.1-py3-none-any.whl"}, "another distribution or version"),
    "no wheel's name": ({"name": "demo.whl"}, "file's name"),
    "foreign data": ({"files": {"numpy-1.0.data/purelib/a.py": b""}}, "another distribution"),
    "unknown key": ({"files": {"demo-1.0.data/evil/a": b""}}, "has no destination"),
    "key alone": ({"files": {"demo-1.0.data/data": b""}}, "has no destination"),
    "same place": (
        {"files": {"demo/a.py": b"1", "demo-1.0.data/platlib/demo/a.py": b"2"}},
        "two of its files",
    ),
    "entry point over a data file": (
        {"files": {**_scripts("[console_scripts]\nrun = demo:main\n")["files"], "demo-1.0.data/data/bin/run": b""}},
        "two of its files",
    ),
    "the environment's interpreter": ({"files": {"demo-1.0.data/scripts/python": b"#!/bin/sh"}}, "bin/python"),
    "the interpreter by data": ({"files": {"demo-1.0.data/data/bin/python3.11": b""}}, "bin/python3.11"),
    "the environment": ({"files": {"demo-1.0.data/data/pyvenv.cfg": b""}}, "pyvenv.cfg"),
    "the directory of programs": (
        {"files": {"demo-1.0.data/data/bin": b""}},
        "demo-1.0.data/data/bin.*'opt/model/bin'",
    ),
    "script without a line's end": (
        {"files": {"demo-1.0.data/scripts/run": b"#!python" + os.urandom(9000).replace(b"\n", b" ")}},
        "no end",
    ),
    "entry point with a path": (_scripts("[console_scripts]\n../run = demo:main\n"), "'..'"),
    "entry point below a path": (_scripts("[console_scripts]\na/b = demo:main\n"), "is a path"),
    "entry point as whiteout": (_scripts("[console_scripts]\n.wh.python = demo:main\n"), "another layer"),
    "entry point with code": (_scripts("[console_scripts]\nrun = os;evil():main\n"), "entry points cannot be read"),
    "entry point without function": (_scripts("[console_scripts]\nrun = demo\n"), "entry points cannot be read"),
    "entry point twice": (
        _scripts("[console_scripts]\nrun = demo:main\n[gui_scripts]\nrun = demo:main\n"),
        "occurs twice",
    ),
    "entry points of no grammar": (_scripts("run = demo:main\n"), "entry points cannot be read"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_wheel_is_refused_by_its_name(tmp_path, case):
    how, why = HOSTILE[case]
    path = make(tmp_path, **how)
    with pytest.raises(InvalidWheel, match=why) as caught:
        built(path)
    assert path.name in str(caught.value)
    assert caught.value.exit_code == ExitCode.DATA
    assert caught.value.remedy


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    monkeypatch.setattr("builder.wheels.zip.FREE_SIZE", 1 << 20)
    path = make(tmp_path, {"demo/zeros": bytes(4 << 20)})
    with pytest.raises(InvalidWheel, match="zip bomb"):
        open_wheel(path)


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("builder.wheels.zip.MOST_MEMBERS", 3)
    with pytest.raises(InvalidWheel, match="more than 3 members"):
        open_wheel(make(tmp_path, FILES))


@pytest.mark.parametrize("count", [1, 2, 40_001, 60_000])
def test_a_directory_of_more_entries_than_declared_costs_no_memory(tmp_path, count):
    directory = (b"PK\x01\x02" + bytes(42)) * 40_000
    end = struct.pack("<4s4HIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), 0, 0)
    path = tmp_path / "a.zip"
    path.write_bytes(directory + end)
    with path.open("rb") as file:
        tracemalloc.start()
        with pytest.raises(BadArchive, match="another size, or other members"):
            read_directory(file.fileno())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_wheel_that_changes_after_it_was_opened_is_refused(tmp_path):
    wheel = open_wheel(make(tmp_path, FILES))
    make(tmp_path, {"demo/__init__.py": b"other"})
    with pytest.raises(InvalidWheel, match="changed"):
        list(WheelLayer(wheel, python=PYTHON))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"streamed": True},
        {"zip64": True},
        {"streamed": True, "zip64": True},
        {"methods": {"demo/__init__.py": zipfile.ZIP_STORED}},
        {"rows": _rows_of("demo/__init__.py", (digest(MODULE, "sha512"), str(len(MODULE))))},
        {"unlisted": {f"{INFO}/RECORD.jws": b"{}", f"{INFO}/RECORD.p7s": b""}},
    ],
    ids=["plain", "data descriptors", "zip64", "both", "stored", "sha512", "signatures"],
)
def test_valid_archives_of_every_form_are_installed(tmp_path, how):
    files = {
        **FILES,
        "demo/": b"",
        "demo/Größe.txt": "ß".encode(),
        "demo/grö\u0308ße.txt": b"combining",
        "demo/a.txt": b"",
        "demo/A.txt": b"upper",
        "demo/" + "long/" * 20 + "name": b"deep",
    }
    layer, data = built(make(tmp_path, files, **how))
    found = unpacked(data)
    expected = {f"{SITE}/{name}": content for name, content in files.items() if not name.endswith("/")}
    assert {path: content for path, (_, content) in found.items() if INFO not in path} == expected
    assert {mode for mode, _ in found.values()} == {0o644}
    assert layer.layer.size == len(data)


HELLO = b"#!python\nprint('hello')\n"
MISRECORDED = {
    "METADATA": ({f"{INFO}/METADATA": (digest(b"another"), "7")}, f"{INFO}/METADATA"),
    "a hash": ({BOTH[0]: (digest(b"x"), str(len(MODULE)))}, BOTH[0]),
    "a size": ({BOTH[0]: (digest(MODULE), "1")}, BOTH[0]),
    "a hash of another length": ({BOTH[0]: ("sha256=AAAA", "")}, BOTH[0]),
    "another algorithm": ({BOTH[0]: (digest(b"x", "sha512"), "1")}, BOTH[0]),
    "a script": ({"demo-1.0.data/scripts/hello": (digest(b"x"), "1")}, "demo-1.0.data/scripts/hello"),
}


@pytest.mark.parametrize(("rows", "named"), MISRECORDED.values(), ids=MISRECORDED.keys())
def test_a_wrong_entry_in_record_is_corrected_in_the_layer(tmp_path, rows, named):
    """As the official wheels of torch 1.7 to 1.12, whose METADATA was changed after RECORD was written."""
    files = {**FILES, "demo/b.py": b"", "demo-1.0.data/scripts/hello": HELLO}
    layer, data = built(make(tmp_path, files, rows=lambda listed: listed.update(rows)))
    assert layer.misrecorded == {NAME: (named,)}
    found = unpacked(data)
    assert found[f"{SITE}/{BOTH[0]}"] == (0o644, MODULE)
    for name, hashed, size in csv.reader(io.StringIO(found[f"{SITE}/{INFO}/RECORD"][1].decode())):
        content = found[os.path.normpath(Path(SITE) / name)][1]
        if name != f"{INFO}/RECORD":
            assert (hashed, size) == (digest(content, hashed.partition("=")[0]), str(len(content)))


def test_a_correct_record_has_no_misrecorded_files(tmp_path):
    layer, _ = built(make(tmp_path, {**FILES, "demo-1.0.data/scripts/hello": HELLO}))
    assert layer.misrecorded == {}


def test_a_layer_holds_what_the_installer_writes(tmp_path):
    script = b"#!python -E\nprint('hello')\n"
    path = make(
        tmp_path,
        {
            **FILES,
            f"{INFO}/entry_points.txt": b"[console_scripts]\nrun = demo.cli:main.go\n[gui_scripts]\nshow = demo:main [extra]\n",
            f"{INFO}/INSTALLER": b"evil\n",
            "demo-1.0.data/scripts/hello": script,
            "demo-1.0.data/scripts/binary": b"\x7fELF",
            "demo-1.0.data/scripts/run-script.py": b"made by setuptools",
            "demo-1.0.data/headers/demo.h": b"/* */",
            "demo-1.0.data/data/share/demo.txt": b"shared",
            "demo-1.0.data/platlib/demo/native.so": b"\x7fELF",
        },
        modes={
            "demo-1.0.data/scripts/hello": 0o100755,
            "demo-1.0.data/scripts/binary": 0o104711,
            "demo/__init__.py": 0o600,
        },
    )
    _, data = built(path)
    found = unpacked(data)
    assert found["opt/model/bin/hello"] == (0o755, b"#!/opt/model/bin/python\nprint('hello')\n")
    assert found["opt/model/bin/binary"] == (0o755, b"\x7fELF")
    assert found[f"opt/model/include/site/python{PYTHON}/demo/demo.h"] == (0o644, b"/* */")
    assert found["opt/model/share/demo.txt"] == (0o644, b"shared")
    assert found[f"{SITE}/demo/native.so"] == (0o644, b"\x7fELF")
    assert found[f"{SITE}/{INFO}/INSTALLER"] == (0o644, b"model-image-builder\n")
    mode, run = found["opt/model/bin/run"]
    assert mode == 0o755
    assert run.startswith(b"#!/opt/model/bin/python\n")
    assert b"from demo.cli import main\n" in run
    assert b"main.go()" in run
    assert "opt/model/bin/run-script.py" not in found
    assert found["opt/model/bin/show"][0] == 0o755
    rows = list(csv.reader(io.StringIO(found[f"{SITE}/{INFO}/RECORD"][1].decode())))
    base = Path(SITE)
    for name, hashed, size in rows:
        mode_and_content = found[os.path.normpath(base / name)]
        if name != f"{INFO}/RECORD":
            assert (hashed, size) == (digest(mode_and_content[1]), str(len(mode_and_content[1])))
    assert {os.path.normpath(base / name) for name, _, _ in rows} == set(found)
    assert [name for name, _, _ in rows if name.endswith("hello")] == ["../../../bin/hello"]


def test_directories_stand_before_what_is_in_them_and_belong_to_root(tmp_path):
    _, data = built(make(tmp_path, {"demo/a/b.py": b"", "demo/c.py": b""}))
    seen = set()
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            assert (member.uid, member.gid, member.mtime) == (0, 0, 315_619_200)
            assert member.isfile() or member.mode == 0o755
            above = member.name.rpartition("/")[0]
            assert not above or above in seen
            assert member.name not in seen
            seen.add(member.name)
    assert {"opt", "opt/model", f"{SITE}/demo/a"} <= seen


def test_of_the_archive_only_the_compression_changes_the_digest(tmp_path):
    files = {"demo/a.py": b"a" * 1000, "demo/b.py": b"b" * 1000}
    one, _ = built(make(tmp_path / "1", files))
    again, _ = built(make(tmp_path / "2", dict(reversed(files.items()))))
    stored, _ = built(make(tmp_path / "3", files, methods=dict.fromkeys(files, zipfile.ZIP_STORED)))
    assert one.layer == again.layer
    assert stored.layer.diff_id == one.layer.diff_id
    assert stored.layer.digest != one.layer.digest


def test_a_layer_is_the_same_bytes_in_every_process_and_version(tmp_path, monkeypatch):
    """A change of this digest is a change of every layer in every registry: raise LAYOUT with it."""
    monkeypatch.setattr("builder.oci.layer.deflated", stored)  # zlib's part is in the key: see `zlib_identity`
    path = make(tmp_path, {**FILES, **_scripts("[console_scripts]\nrun = demo:main\n")["files"]}, methods=_all_stored())
    layer = WheelLayer(open_wheel(path), python="3.11")
    data = b"".join(layer)
    assert str(layer.layer.digest) == GOLDEN
    assert b"".join(layer) == data


def _all_stored():
    """Stored members, so that no compressor of this machine is in the golden digest."""
    names = ["demo/__init__.py", *(f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt"))]
    return dict.fromkeys(names, zipfile.ZIP_STORED)


GOLDEN = "sha256:7c2666bbbb9cbab0a873307631706973e12c40629ef53dd1c1963478e70b9496"


def test_memory_is_bounded_by_chunks(tmp_path):
    content = (b"0123456789abcdef" * 4096 + os.urandom(4096)) * 512
    path = make(tmp_path, {"demo/weights.bin": content, "demo-1.0.data/scripts/big": b"#!python\n" + content})
    assert len(content) > 32 << 20
    del content
    wheel = open_wheel(path)
    tracemalloc.start()
    try:
        largest = max(len(chunk) for chunk in WheelLayer(wheel, python=PYTHON))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest < 1 << 20
    assert peak < 6 << 20


def test_a_key_is_a_tag_of_all_that_a_layer_depends_on(monkeypatch):
    hashed = "0" * 64
    keys = {
        layer_key(hashed, python="3.11"),
        layer_key(hashed, python="3.12"),
        layer_key("1" * 64, python="3.11"),
        layer_key(hashed, python="3.11", bytecode=compiler()),
    }
    monkeypatch.setitem(layer_key.__globals__, "zlib_identity", lambda: "0" * 8)
    keys |= {layer_key(hashed, python="3.11"), layer_key(hashed, python="3.11", bytecode=compiler())}
    assert len(keys) == 6
    for key in keys:
        assert Reference.parse(f"registry.example.com/wheel-layers:{key}").tag == key


def test_independent_readers_take_the_layer(tmp_path):
    """GNU gzip, GNU tar and zlib in one go, beside Python's tarfile above; crane's is in test_wheel_images."""
    _, data = built(make(tmp_path, {**FILES, "demo/ü": b"x" * 100_000}, methods={"demo/ü": zipfile.ZIP_STORED}))
    blob = tmp_path / "layer.tar.gz"
    blob.write_bytes(data)
    subprocess.run(["gzip", "-t", blob], check=True, capture_output=True)
    (tmp_path / "out").mkdir()
    done = subprocess.run(["tar", "xzf", blob, "-C", tmp_path / "out"], check=True, capture_output=True)
    assert not done.stderr
    assert (tmp_path / "out" / SITE / "demo/ü").read_bytes() == b"x" * 100_000
    rest, archive = data, b""
    while rest:
        member = zlib.decompressobj(wbits=31)
        archive += member.decompress(rest)
        assert member.eof
        rest = member.unused_data
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert f"{SITE}/demo/__init__.py" in tar.getnames()


def test_the_module_is_quick_to_import():
    """Importing the wheel's modules must not bring the network or the model registry along."""
    code = "import sys, builder.wheels.install; print(sorted({'httpx2', 'mlflow', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"

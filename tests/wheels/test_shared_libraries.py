"""Which wheels want a library that nobody has: what is refused, what is a warning, and what is kept of it."""

import json
import os
import time
import tracemalloc

import pytest

from builder.reference import Platform
from builder.wheels.install import WheelLayer
from builder.wheels.shared_libraries import Imports, Library, WheelLibraries, _Kept, from_note, lacking, to_note
from builder.wheels.wheel import open_wheel
from tests.package_index.server import make_wheel
from tests.wheels.elf import AMD64, ARM64, make_elf

LINUX = Platform("linux", "amd64")
TAG = "cp311-cp311-manylinux_2_17_x86_64"
SUFFIX = ".cpython-311-x86_64-linux-gnu.so"


@pytest.fixture
def libraries(tmp_path):
    """Return the libraries of a wheel of some files, as they are read while its layer is made."""

    def read(name, files, python="3.11"):
        filename, content = make_wheel(name, "1.0", tag=TAG, files=files)
        (tmp_path / filename).write_bytes(content)
        layer = WheelLayer(open_wheel(tmp_path / filename), python=python)
        for _ in layer:
            pass
        assert from_note(layer.layer.note) == layer.libraries
        assert [path.name for path in tmp_path.iterdir() if path.suffix != ".whl"] == []
        (found,) = layer.libraries
        return found

    return read


def judged(*wheels, there=("libstdc++.so.6",), platform=LINUX):
    """Return `refused` or `warning`, and what is missing, of each wheel that lacks something."""
    return {
        lack.wheel.partition("-")[0]: ("warning" if lack.loads else "refused", lack.missing)
        for lack in lacking(wheels, there, platform)
    }


def test_the_libraries_of_a_wheel_are_read(libraries):
    found = libraries(
        "pack",
        {
            f"pack/_main{SUFFIX}": make_elf("libinner.so.2", "libm.so.6", "libc.so.6", module="_main"),
            "pack/_stable.abi3.so": make_elf("ld-linux-x86-64.so.2", module="_stable"),
            "pack/_plain.so": make_elf("libpthread.so.0", "libGL.so.1", module="_plain"),
            "pack/_other.cpython-312-x86_64-linux-gnu.so": make_elf(module="_other"),
            "pack/plugins/libplugin.so": make_elf("libGL.so.1"),
            "pack.libs/libinner-1f2e.so.2": make_elf(soname="libinner.so.2"),
            "pack/arm.so": make_elf("libarm.so", machine=ARM64),
            "pack/text.so": b"INPUT(-lx)",
            "pack/program": make_elf("libGL.so.1"),
            "pack/__init__.py": b"import os\n\nfrom pack import (\n    _main as m,\n)\ntry:\n    import pack._stable\nexcept ImportError: ...\n",
        },
    )
    assert len({each.place for each in found.libraries}) == len(found.libraries)
    assert found._replace(libraries=tuple(each._replace(place="") for each in found.libraries)) == WheelLibraries(
        f"pack-1.0-{TAG}.whl",
        (
            Library("libinner-1f2e.so.2", "libinner.so.2", AMD64, "bundled", (), ""),
            Library(f"_main{SUFFIX}", "", AMD64, "imported", ("libinner.so.2",), ""),
            Library("_other.cpython-312-x86_64-linux-gnu.so", "", AMD64, "library", (), ""),
            Library("_plain.so", "", AMD64, "importable", ("libGL.so.1",), ""),
            Library("_stable.abi3.so", "", AMD64, "optional", (), ""),
            Library("arm.so", "", ARM64, "library", ("libarm.so",), ""),
            Library("libplugin.so", "", AMD64, "library", ("libGL.so.1",), ""),
            Library("text.so", "", 0, "unread", (), ""),
        ),
    )


@pytest.mark.parametrize("middle", [9 << 20, 60 << 20])
def test_the_middle_of_a_large_library_is_not_kept(libraries, monkeypatch, middle):
    written = []

    class Watched(_Kept):
        def __init__(self, file, size):
            super().__init__(file, size)
            written.append(file)

        def add(self, content):
            super().add(content)
            written.append(os.fstat(self._file.fileno()).st_blocks * 512)

    monkeypatch.setattr("builder.wheels.shared_libraries._Kept", Watched)
    monkeypatch.setattr("builder.wheels.shared_libraries._HEAD", 32 << 20)
    # As patchelf leaves them: the names are at the end.
    large = make_elf("libGL.so.1", module="_main", padding=middle)
    (found,) = libraries("pack", {f"pack/_main{SUFFIX}": large}).libraries
    assert (found.use, found.needed) == ("importable", ("libGL.so.1",))
    assert max(written[1:]) < 50 << 20
    # What no linker writes: the names are in the middle.
    (found,) = libraries("pack", {f"pack/_main{SUFFIX}": large + bytes(middle)}).libraries
    assert (found.use, found.needed) == (("importable", ("libGL.so.1",)) if middle < 16 << 20 else ("library", ()))


EXTENSION = {f"pack/_main{SUFFIX}": make_elf("libGL.so.1", module="_main")}
INTACT = {f"pack/_fast{SUFFIX}": make_elf("libstdc++.so.6", module="_fast")}
PLUGIN = {"pack/plugins/libplugin.so": make_elf("libGL.so.1")}
CASES = {
    "an extension": (EXTENSION, "refused", {"libGL.so.1": f"_main{SUFFIX}"}),
    "an extension, through what was bundled": (
        {
            f"pack/_main{SUFFIX}": make_elf("libgui-1f2e.so.5", module="_main"),
            "pack.libs/libgui-1f2e.so.5": make_elf("libcore-2f3e.so", soname="libgui-1f2e.so.5"),
            "pack.libs/libcore-2f3e.so": make_elf("libglib-2.0.so.0"),
        },
        "refused",
        {"libglib-2.0.so.0": "libcore-2f3e.so"},
    ),
    "libraries that need one another": (
        {
            f"pack/_main{SUFFIX}": make_elf("liba.so", module="_main"),
            "pack/liba.so": make_elf("libb.so"),
            "pack/libb.so": make_elf("liba.so", "libGL.so.1"),
        },
        "refused",
        {"libGL.so.1": "libb.so"},
    ),
    "a library that cannot be read": (
        {
            f"pack/_main{SUFFIX}": make_elf("libinner.so", "libother.so.1", module="_main"),
            "pack/libinner.so": b"INPUT(-lreal)",
            "pack/libother.so.1": b"\x7fELF" + bytes(100),
        },
        None,
        None,
    ),
    "what is loaded by ctypes, beside a library that cannot be read": (
        {"pack/lib/lib_pack.so.1": make_elf("libgomp.so.1"), "pack/lib/lib_pack.so": b"INPUT(lib_pack.so.1)"},
        "refused",
        {"libgomp.so.1": "lib_pack.so.1"},
    ),
    "a plug-in": (INTACT | PLUGIN, "warning", {"libGL.so.1": "libplugin.so"}),
    # Numba's pools for OpenMP and TBB, torchaudio's for FFmpeg: what fails is caught.
    "one extension of two": (
        EXTENSION | INTACT | {"pack/use.py": b"def f():\n    import pack._main\n"},
        "warning",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    "one of two, which is imported": (
        EXTENSION | INTACT | {"pack/__init__.py": b"from ._main import *\n"},
        "refused",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    "one of two, which is imported by way of others": (
        EXTENSION
        | INTACT
        | {
            "pack/__init__.py": b"import os, pack.inner.first as f\n",
            "pack/inner/__init__.py": b"from . import (  # and\n    nothing,\n    second,\n)\n",
            "pack/inner/first.py": b"",
            "pack/inner/second.py": b"from \\\n  .. import _main as m\n",
        },
        "refused",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    # VTK's.
    "one of two, which a module beside the package imports": (
        EXTENSION | INTACT | {"packs.py": b"from pack._main import *\n", "pack/__init__.py": b""},
        "refused",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    "one of two, which a part of the package imports that nothing does": (
        EXTENSION | INTACT | {"pack/__init__.py": b"", "pack/viz.py": b"from pack import _main\n"},
        "warning",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    "one of two, of which an imported module has the name": (
        EXTENSION | INTACT | {"pack/__init__.py": b"import _main\nfrom other import _main\nfrom .other import _main\n"},
        "warning",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    "one of two, of which only a text tells": (
        EXTENSION
        | INTACT
        | {"pack/__init__.py": b'r"""A \\""" text:\n\nimport pack._main\n"""\nx = "\\\nimport pack._main"  # """\n'},
        "warning",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    "the only one, which is tried": (
        EXTENSION
        | PLUGIN
        | {"pack/__init__.py": b"try:\n    from pack import (\n_main)\nexcept (OSError, ImportError):\n    _main = None\n"},
        "warning",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    "the only one, which is tried in a function": (
        EXTENSION
        | {
            "pack/__init__.py": b"def f():\n    try:\n        try:\n            from . import _main\n"
            b"        finally:\n            g()\n    except:\n        pass\n"
        },
        "warning",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    "the only one, which is tried and needed": (
        EXTENSION
        | {
            "pack/__init__.py": b"try:\n    from . import _main\nexcept Exception:\n    pass\n",
            "pack/a.py": b"from . import _main",
        },
        "refused",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    # numpy's.
    "the only one, of which it is told that it failed": (
        EXTENSION
        | {
            "pack/__init__.py": b"try:\n    from . import _main\nexcept ImportError as e:\n"
            b"    if e:\n        raise RuntimeError from e\n"
        },
        "refused",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    "the only one, of which another failure is caught": (
        EXTENSION | {"pack/__init__.py": b"try:\n    from . import _main\nexcept KeyError:\n    pass\n"},
        "refused",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    "one that is needed beside one that is tried": (
        EXTENSION | INTACT | {"pack/__init__.py": b"try:\n    from . import _fast\nexcept ImportError: pass\n"},
        "warning",
        {"libGL.so.1": f"_main{SUFFIX}"},
    ),
    # PyQt5's.
    "nine extensions of ten": (
        INTACT | {f"pack/_m{n}{SUFFIX}": make_elf("libGL.so.1", module=f"_m{n}") for n in range(9)},
        "refused",
        {"libGL.so.1": f"_m0{SUFFIX}"},
    ),
    "eight extensions of nine": (
        INTACT | {f"pack/_m{n}{SUFFIX}": make_elf("libGL.so.1", module=f"_m{n}") for n in range(8)},
        "warning",
        {"libGL.so.1": f"_m0{SUFFIX}"},
    ),
    # LightGBM's.
    "what is loaded by ctypes": ({"pack/lib/lib_pack.so": make_elf("libgomp.so.1")}, "refused", {"libgomp.so.1": "lib_pack.so"}),
    # bitsandbytes has a library for each release of CUDA, and one without.
    "one of what may be loaded by ctypes": (
        {"pack/libpack_cuda.so": make_elf("libcudart.so.11.0"), "pack/libpack_cpu.so": make_elf("libstdc++.so.6")},
        "warning",
        {"libcudart.so.11.0": "libpack_cuda.so"},
    ),
    "a library for another machine": ({f"pack/_main{SUFFIX}": make_elf("libGL.so.1", module="_main", machine=ARM64)}, None, None),
    "the driver of a graphics card": ({f"pack/_main{SUFFIX}": make_elf("libcuda.so.1", "libnvidia-ml.so.1", module="_main")}, None, None),
    "what the base has": ({f"pack/_main{SUFFIX}": make_elf("libstdc++.so.6", module="_main")}, None, None),
}  # fmt: skip


@pytest.mark.parametrize(("files", "verdict", "missing"), CASES.values(), ids=CASES.keys())
def test_a_missing_library_refuses_the_wheel_or_warns(libraries, files, verdict, missing):
    assert judged(libraries("pack", files)) == ({"pack": (verdict, missing)} if verdict else {})


def test_wheels_have_libraries_for_one_another(libraries):
    user = libraries("user", {f"user/_main{SUFFIX}": make_elf("libcore.so.1", module="_main")})
    by_soname = libraries("core", {"nvidia/core/lib/libcore.so.1.2": make_elf(soname="libcore.so.1")})
    by_name = libraries("core", {"core/libcore.so.1": make_elf(soname="libelse.so")})
    assert judged(user) == {"user": ("refused", {"libcore.so.1": f"_main{SUFFIX}"})}
    assert judged(user, by_soname) == judged(by_name, user) == {}
    assert judged(user, there=["libcore.so.1"]) == {}
    # Where the other wheel's library cannot be loaded, both wheels are dead; one that can be is enough.
    broken = libraries("core", {"core/libcore.so.1": make_elf("libGL.so.1")})
    both = judged(user, broken)
    assert both["user"] == ("refused", {"libGL.so.1": f"libcore.so.1 of core-1.0-{TAG}.whl"})
    assert both["core"] == ("refused", {"libGL.so.1": "libcore.so.1"})
    assert judged(user, broken, by_soname) == {"core": both["core"]}


@pytest.mark.parametrize("grouped", [False, True])
def test_a_library_that_a_later_wheel_overwrites_does_not_matter(libraries, tmp_path, grouped):
    # opencv-python beside opencv-python-headless, each of which somebody requires.
    path = "cv2/cv2.abi3.so"
    contents = {
        "opencv-python": {path: make_elf("libGL.so.1", module="cv2"), "cv2/qt/plugins/libqxcb.so": make_elf("libX11.so.6")},
        "opencv-python-headless": {path: make_elf("libstdc++.so.6", module="cv2")},
    }  # fmt: skip
    both = [libraries(name, files) for name, files in contents.items()]
    verdicts = []
    for order in (both, both[::-1]):
        if grouped:
            # In a layer the first of two files in one place is kept.
            names = [wheel.wheel for wheel in reversed(order)]
            group = WheelLayer(*(open_wheel(tmp_path / name) for name in names), python="3.11")
            for _ in group:
                pass
            order = from_note(group.layer.note)  # noqa: PLW2901
        verdicts.append(judged(*order))
    assert verdicts == [
        {"opencv_python": ("warning", {"libX11.so.6": "libqxcb.so"})},
        {"opencv_python": ("refused", {"libGL.so.1": "cv2.abi3.so"})},
    ]


def test_an_overwritten_library_does_not_serve_other_wheels(libraries):
    user = libraries("user", {f"user/_main{SUFFIX}": make_elf("libcore.so.1", module="_main")})
    first = libraries("first", {"core/libcore.so": make_elf(soname="libcore.so.1")})
    other = libraries("other", {"core/libcore.so": make_elf(soname="libcore.so.2")})
    assert judged(user, other, first) == {}
    assert judged(user, first, other) == {"user": ("refused", {"libcore.so.1": f"_main{SUFFIX}"})}


def test_the_same_wheel_on_two_platforms(libraries):
    wheel = libraries(
        "pack",
        {
            "pack/_amd.so": make_elf("libGL.so.1", module="_amd"),
            "pack/_arm.so": make_elf("libEGL.so.1", module="_arm", machine=ARM64),
        },
    )
    assert judged(wheel)["pack"][1] == {"libGL.so.1": "_amd.so"}
    assert judged(wheel, platform=Platform("linux", "arm64"))["pack"][1] == {"libEGL.so.1": "_arm.so"}
    assert judged(wheel, platform=Platform("linux", "mips64le")) == {}


def test_packages_of_debian_are_known(libraries):
    (lack,) = lacking([libraries("pack", EXTENSION)], (), LINUX)
    assert lack.packages == ["libgl1"]


def test_libraries_that_do_not_fit_into_a_note_are_null(libraries):
    many = tuple(Library(f"lib{number:0200}.so", "", AMD64, "library", (), f"{number:016x}") for number in range(5000))
    assert to_note([WheelLibraries("x.whl", many)]) == "null"
    assert from_note("null") is None


def test_collecting_libraries_stops_when_the_note_is_full(tmp_path):
    large = make_elf(*(f"lib{number:0240}.so" for number in range(256)))
    wheels = []
    for name in ("one", "two", "three"):
        filename, content = make_wheel(name, "1.0", tag=TAG, files={f"{name}/lib{n}.so": large for n in range(12)})
        (tmp_path / filename).write_bytes(content)
        wheels.append(open_wheel(tmp_path / filename))
    group = WheelLayer(*wheels, python="3.11")
    for _ in group:
        pass
    assert group.layer.note == "null"
    # 65 kB each: all of the first wheel, of the second what makes it too much, and of the third nothing.
    assert [len(wheel.libraries) for wheel in group.libraries] == [12, 5, 0]
    alone = WheelLayer(wheels[2], python="3.11")
    for _ in alone:
        pass
    assert from_note(alone.layer.note) == alone.libraries
    assert len(alone.libraries[0].libraries) == 12


@pytest.mark.parametrize(
    "changed",
    ["", "{", "[]]", "1", '[["w.whl"]]', '[["w.whl", [["libx.so", "", 62, "whatever", []]]]]'],
)
def test_an_invalid_note_is_refused(changed):
    with pytest.raises(ValueError, match="libraries"):
        from_note(changed)


def test_refusing_a_long_invalid_note_is_cheap():
    def refused():
        for changed in (
            f"[{','.join('0' * 500_000)}]",
            "[" + " " * (64 << 20) + "]",
            f'[["w",[{",".join(["0"] * 500_000)}]]]',
        ):
            with pytest.raises(ValueError, match="libraries"):
                from_note(changed)
            del changed

    began = time.thread_time()
    refused()
    taken = time.thread_time() - began
    tracemalloc.start()
    refused()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 6 seconds and 800 MiB where each error is told.
    assert taken < 2
    assert most < 160 << 20


@pytest.mark.parametrize("name", ["", "a/b", "\x1b[31m", "x" * 256, "a b", "x\n"])
def test_a_note_with_invalid_names_is_refused(name):
    good = ["w.whl", [["libx.so", "", AMD64, "library", ["libz.so.1"], "0" * 16]]]
    assert from_note(json.dumps([good]))[0].libraries[0].needed == ("libz.so.1",)
    for position, value in ((0, name), (4, [name]), (5, name), *([(1, name)] if name else [])):
        library = [*good[1][0]]
        library[position] = value
        with pytest.raises(ValueError, match="libraries"):
            from_note(json.dumps([["w.whl", [library]]]))


def test_a_large_environment_is_judged_in_linear_time():
    # Each needs the next, and the last one what nobody has.
    count, began = 20_000, time.thread_time()
    chain = tuple(Library(f"l{n}.so", "", AMD64, "library", (f"l{n + 1}.so",), f"{n:016x}") for n in range(count))
    (lack,) = lacking([WheelLibraries("w.whl", chain)], (), LINUX)
    assert (lack.missing, lack.loads) == ({f"l{count}.so": f"l{count - 1}.so"}, False)
    # All have the same name, and need it.
    same = tuple(
        Library(f"l{n}.so", "l.so", AMD64, "library", ("l.so", f"libgone{n}.so"), f"{n:016x}") for n in range(count)
    )
    (lack,) = lacking([WheelLibraries("w.whl", same)], (), LINUX)
    assert (len(lack.missing), lack.loads) == (count, False)
    # A second, and 25 where each name is looked at for each that needs it.
    assert time.thread_time() - began < 8


HOSTILE = {
    "brackets": b"from a import (\n" * 60_000,
    "spaces": b"import" + b" " * 900_000,
    "spaces of a name": b"from" + b" " * 900_000 + b"x",
    "spaces within names": b"from a" + b" " * 450_000 + b"." + b" " * 450_000 + b"b",
    "lines": b"\n" * 900_000,
    "words": b"a\n" * 450_000,
    "dots": b"from " + b"." * 900_000 + b" x",
    "packages": b"import " + b"a." * 450_000,
    "names of a package": b"from " + b"a." * 120 + b"a import " + b"b," * 400_000,
    "many relative imports": b"from . import a\n" * 60_000,
    "indented": b" " * 900_000 + b"x",
    "many tries": b"".join(b" " * depth + b"try:\n" for depth in range(1300)),
    "many lines in tries": b"".join(b" " * depth + b"try:\n" for depth in range(600)) + (b" " * 700 + b"import pack\n") * 1000,
    "many handlers": b"try:\n  import pack\nexcept x:\n" * 30_000,
    "a handler": b"try: x\nexcept " + b"(" * 900_000,
    "texts without an end": b'"""\\' * 200_000,
    "texts in texts": (b'"""\\"' + b"'" * 3) * 100_000 + b"\\",
    "backslashes": b'"' + b"\\x" * 450_000,
    "backslashes in a text": b"'" * 3 + b"\\\\" * 450_000,
    "quotes in a text": b"'" * 3 + b"' " * 450_000,
    "quotes": b"\"'" * 450_000,
    "lines that go on": b"\\\n" * 450_000,
}  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_imports_of_hostile_modules_are_read_in_linear_time(source):
    folders = "pack/" + "a/" * 1900
    file = f"{folders}module.py"
    imports = Imports([file, "pack/__init__.py"])
    began = time.thread_time()
    imports.add(file, source)
    assert imports.imported == set()
    assert len(source) < 1 << 20
    assert time.thread_time() - began < 4

"""Bytecode: the same from every process, for what Python imports, and never at the price of a hang."""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import random
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builder.errors import TryAgain
from builder.wheels import bytecode as program
from builder.wheels import install as module
from builder.wheels.install import Compiler, WheelLayer
from builder.wheels.wheel import InvalidWheel, open_wheel
from tests.wheels.made import INFO, PYTHON, SITE, built, compiler, make, unpacked

# Two equal sets are one constant or two, depending on whether a process has interned these words before.
SETS = b"""
def one():
    words = {"alpha_word", "beta_word", "gamma_word"}
    return words, "alpha_word"

def two():
    return {"alpha_word", "beta_word", "gamma_word"}
"""
NAMES = b"alpha_word = beta_word = gamma_word = 1\n"


def _many(count: int = 150) -> dict[str, bytes]:
    """Sources that share strings with one another."""
    random.seed(1)
    words = [f"word_{number}" for number in range(400)]
    return {
        f"demo/m{number:03}.py": SETS
        + "".join(
            f"def f{n}({', '.join(random.sample(words, 3))}): return {random.sample(words, 4)!r} in {set(random.sample(words, 5))!r}\n"
            for n in range(10)
        ).encode()
        for number in range(count)
    }


def _compiled(name: str) -> str:
    folder, _, stem = f"{SITE}/{name}".rpartition("/")
    return f"{folder}/__pycache__/{stem.removesuffix('.py')}.{sys.implementation.cache_tag}.pyc"


def test_bytecode_is_what_python_believes_without_looking_at_the_source(tmp_path):
    _, data = built(
        make(tmp_path, {"demo/a.py": b"def where(): return where.__code__.co_filename\n"}), bytecode=compiler()
    )
    mode, content = unpacked(data)[_compiled("demo/a.py")]
    assert mode == 0o644
    source = b"def where(): return where.__code__.co_filename\n"
    assert content[:4] == importlib.util.MAGIC_NUMBER
    assert int.from_bytes(content[4:8], "little") == 0b01  # hash-based, not checked
    assert content[8:16] == importlib.util.source_hash(source)
    names: dict[str, object] = {}
    exec(marshal.loads(content[16:]), names)
    assert names["where"]() == f"/{SITE}/demo/a.py"


def test_python_imports_it_in_the_place_of_the_source(tmp_path):
    _, data = built(make(tmp_path / "wheel", {"demo/a.py": b"VALUE = 1\n"}), bytecode=compiler())
    for path, (_, content) in unpacked(data).items():
        target = tmp_path / "out" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    (tmp_path / "out" / SITE / "demo/a.py").write_bytes(b"VALUE = 2\n")
    command = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path / 'out' / SITE)!r}); import demo.a; print(demo.a.VALUE)",
    ]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "1"


def test_a_layer_is_the_same_whatever_its_maker_did_before_and_does_beside(tmp_path):
    path = make(tmp_path, _many())
    with ThreadPoolExecutor(3) as pool:
        one, *others = pool.map(lambda _: built(path, bytecode=compiler())[0], range(4))
    assert [other.layer for other in others] == [one.layer] * 3
    assert not one.without_bytecode
    program = (
        "import asyncio, decimal, email, sqlite3, unittest, xml.dom.minidom, sys, pathlib\n"
        "from tests.wheels.made import built, compiler\n"
        "alpha_word = beta_word = gamma_word = 1\n"
        "print(built(pathlib.Path(sys.argv[1]), bytecode=compiler())[0].layer.digest)\n"
    )
    environ = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONOPTIMIZE": "2", "PYTHONPATH": str(Path.cwd())}
    other = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", program, path],
        env=environ,
        check=True,
        capture_output=True,
        text=True,
    )
    assert other.stdout.strip() == str(one.layer.digest)


def test_bytecode_depends_on_what_the_process_compiled_before():
    """The premise of it all: Python's bytecode depends on history, so each wheel has a fresh process."""
    program = (
        "import marshal\n"
        f"sets = {SETS!r}\n"
        "fresh = marshal.dumps(compile(sets, 'x', 'exec'))\n"
        f"kept = compile({NAMES!r}, 'y', 'exec')\n"
        "print(fresh != marshal.dumps(compile(sets, 'x', 'exec')))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True, capture_output=True, text=True)
    if sys.version_info[:2] == (3, 11):  # other versions may have lost this way, and have others
        assert done.stdout.strip() == "True"


@pytest.mark.parametrize(
    "source",
    [
        b"def",
        b"print 'hello'\n",
        b"{{ cookiecutter }}: x\n",
        b"\0",
        b"\xff\xfe",
        b"(" * 1000,
        b"-" * 100_000 + b"1",
        b"x = 1" + b"+1" * 1_000_000,
    ],
    ids=["cut off", "Python 2", "template", "null", "no text", "parentheses", "deep", "long sum"],
)
def test_a_source_that_does_not_compile_is_installed_without_bytecode(tmp_path, source):
    layer, data = built(make(tmp_path, {"demo/bad.py": source, "demo/good.py": b"x = 1\n"}), bytecode=compiler())
    found = unpacked(data)
    assert layer.without_bytecode == (f"/{SITE}/demo/bad.py",)
    assert found[f"{SITE}/demo/bad.py"][1] == source
    assert _compiled("demo/good.py") in found
    assert _compiled("demo/bad.py") not in found


def test_importable_sources_outside_of_tests_get_bytecode(tmp_path):
    names = {
        "demo/a.py": True,
        "demo/latest.py": True,
        "demo/test_a.py": True,
        "demo/testing/a.py": True,
        "demo/tests/test_a.py": False,
        "demo/test/a.py": False,
        "demo/a.pyi": False,
        "single.py": True,
        "demo-1.0.data/scripts/run.py": False,
        "demo-1.0.data/data/share/a.py": False,
    }
    stale = {
        "demo/__pycache__/a.cpython-310.pyc": b"old",
        f"demo/__pycache__/a.{sys.implementation.cache_tag}.pyc": b"stale",
    }
    path = make(tmp_path, {**dict.fromkeys(names, b"x = 1\n"), **stale})
    _, data = built(path, bytecode=compiler())
    found = unpacked(data)
    made = {name for name in found if name.endswith(f".{sys.implementation.cache_tag}.pyc")}
    assert made == {_compiled(name) for name, compiled in names.items() if compiled}
    # A wheel's own bytecode of another Python is installed as pip does; of this one, ours has its place.
    assert found[f"{SITE}/demo/__pycache__/a.cpython-310.pyc"][1] == b"old"
    assert found[_compiled("demo/a.py")][1] != b"stale"
    assert f"demo/__pycache__/a.{sys.implementation.cache_tag}.pyc,,\n" in found[f"{SITE}/{INFO}/RECORD"][1].decode()


def test_nothing_of_a_wheel_is_executed(tmp_path):
    mark = tmp_path / "executed"
    evil = f"open({str(mark)!r}, 'w').close()\n".encode()
    built(
        make(tmp_path, {"demo/__init__.py": evil, "sitecustomize.py": evil, "evil.pth": b"import demo\n"}),
        bytecode=compiler(),
    )
    assert not mark.exists()


def test_a_source_that_takes_too_long_refuses_the_wheel(tmp_path):
    # It takes about ten seconds of a processor, in which no signal handler of Python's would run.
    source = b"f'" + b"{a}" * 200_000 + b"'\n"
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(InvalidWheel, match=r"demo-1.0.*too much time") as caught:
        built(make(tmp_path, {"demo/slow.py": source}), bytecode=compiler(seconds=1))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 5
    assert "without bytecode" in caught.value.remedy


def test_a_source_that_is_too_large_has_no_bytecode(tmp_path, monkeypatch):
    monkeypatch.setattr("builder.wheels.install.LARGEST_SOURCE", 10)
    _, data = built(make(tmp_path, {"demo/a.py": b"x = 1 + 1 + 1\n"}), bytecode=compiler())
    assert _compiled("demo/a.py") not in unpacked(data)


@pytest.mark.parametrize("reaped", [False, True])
def test_a_compiler_that_was_killed_is_tried_again(tmp_path, monkeypatch, reaped):
    """The system kills what takes too much memory; that says nothing of the wheel."""
    started = []
    real = subprocess.Popen

    def watched(*args, **kwargs):
        process = real(*args, **kwargs)
        started.append(process)
        os.kill(process.pid, signal.SIGKILL)
        if reaped:  # as by `kill_descendants`
            os.waitpid(process.pid, 0)
        return process

    monkeypatch.setattr(module.subprocess, "Popen", watched)
    with pytest.raises(TryAgain, match="ended from outside"):
        built(make(tmp_path, {"demo/a.py": b"x = 1\n"}), bytecode=compiler())
    assert started


def test_a_full_disk_is_reported_with_a_remedy(tmp_path, monkeypatch):
    real = subprocess.Popen
    with Path("/dev/full").open("wb") as full:
        monkeypatch.setattr(
            module.subprocess, "Popen", lambda *args, **kwargs: real(*args, **{**kwargs, "stdout": full})
        )
        with pytest.raises(TryAgain, match="cannot be written") as caught:
            built(make(tmp_path, {"demo/a.py": b"x = 1\n"}), bytecode=compiler())
    assert "TMPDIR" in caught.value.remedy


@pytest.mark.parametrize("own", [True, False])
def test_the_program_compiles_for_its_parent_alone(own):
    """Of a publish that was killed nothing goes on."""
    with Path(os.devnull).open("rb") as wheel:
        done = subprocess.run(
            [sys.executable, "-S", program.__file__, str(wheel.fileno()), str(os.getpid() if own else 1), "10", "10"],
            input=json.dumps([[0, 0, 0, 0, "/a.py"]]).encode(),
            pass_fds=[wheel.fileno()],
            capture_output=True,
            check=True,
        )
    assert bool(done.stdout) == own


def test_no_process_is_left_when_the_reader_stops(tmp_path, monkeypatch):
    started = []
    real = subprocess.Popen

    def watched(*args, **kwargs):
        started.append(real(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(module.subprocess, "Popen", watched)
    path = make(tmp_path, {**_many(), "demo/a.bin": os.urandom(1 << 20)})
    chunks = iter(WheelLayer(open_wheel(path), python=PYTHON, bytecode=compiler()))
    next(chunks)
    chunks.close()
    assert started
    assert all(process.returncode is not None for process in started)


def test_a_compiler_is_for_one_minor_version():
    found = Compiler.find(PYTHON)
    assert found
    assert f"-{PYTHON}." in found.identity
    assert Compiler.find("3.9") is None
    assert Compiler.find(PYTHON[:-1]) is None
    assert found.cache_tag == sys.implementation.cache_tag

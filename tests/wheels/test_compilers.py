"""Bytecode of a Python that the builder does not run on, compiled by a real interpreter of another Debian release."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from builder.errors import InvalidSettings
from builder.wheels.install import Compiler, WheelLayer, layer_key
from builder.wheels.layer_cache import compiler_for
from builder.wheels.wheel import open_wheel
from scripts.base_image import INTERPRETERS
from tests.wheels.made import make, unpacked

SOURCES = {
    "demo/a.py": b"VALUE = 1\nWORDS = {'alpha', 'beta', 'gamma'}\nNAMES = frozenset({'x', 'y', 'z'})\n",
    "demo/b.py": b"def match(x):\n    match x:\n        case 1:\n            return 'one'\n",
    "demo/latin.py": b"# coding: latin-1\nTEXT = '\xfc'\n",
}


def built(path: Path, python: str, folder: Path) -> tuple[WheelLayer, dict[str, tuple[int, bytes]]]:
    layer = WheelLayer(open_wheel(path), python=python, bytecode=Compiler.find(python, folder))
    return layer, unpacked(b"".join(layer))


@pytest.mark.parametrize("python", INTERPRETERS)
def test_a_model_of_another_python_gets_that_pythons_bytecode(interpreters, tmp_path, python):
    assert not sys.version.startswith(f"{python}.")
    _, files = built(make(tmp_path / "wheel", SOURCES), python, interpreters)
    for path, (_, content) in files.items():
        target = tmp_path / "out" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    site = tmp_path / "out" / f"opt/model/lib/python{python}/site-packages"
    # The bytecode is believed without a look at the source.
    (site / "demo/a.py").write_bytes(b"VALUE = 2\nWORDS = NAMES = ()\n")
    statement = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import demo.a as a, demo.latin as l; print(a.VALUE, l.TEXT)"
    )
    interpreter = interpreters / python / "bin" / f"python{python}"
    command = [interpreter, "-S", "-B", "-X", "utf8", "-c", statement]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "1 ü\n"
    assert f"{site.relative_to(tmp_path / 'out')}/demo/__pycache__/a.cpython-{python.replace('.', '')}.pyc" in files


def test_a_source_for_a_newer_python_has_no_bytecode(interpreters, tmp_path):
    layer, _ = built(make(tmp_path, SOURCES), "3.9", interpreters)
    assert layer.without_bytecode == ("/opt/model/lib/python3.9/site-packages/demo/b.py",)
    layer, _ = built(make(tmp_path, SOURCES), "3.13", interpreters)
    assert layer.without_bytecode == ()


@pytest.mark.parametrize("python", INTERPRETERS)
def test_a_layer_is_the_same_each_time(interpreters, tmp_path, python, monkeypatch):
    path = make(tmp_path, SOURCES)
    first, _ = built(path, python, interpreters)
    # Neither what lies in the current folder nor the environment has a say.
    (tmp_path / "json.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    again, _ = built(path, python, interpreters)
    assert again.layer == first.layer


def test_each_interpreter_has_layers_of_its_own(interpreters):
    own = Compiler.find(f"{sys.version_info.major}.{sys.version_info.minor}", interpreters)
    others = [Compiler.find(python, interpreters) for python in INTERPRETERS]
    keys = {layer_key("0" * 64, python="3.9", bytecode=one) for one in (own, *others, None)}
    assert len(keys) == len(INTERPRETERS) + 2


def test_without_an_interpreter_there_is_no_bytecode(interpreters, tmp_path):
    assert compiler_for("3.9", tmp_path) is None
    assert compiler_for("3.9") is None
    assert compiler_for("2.7", interpreters) is None
    for odd in ("../3.9", "3", "3.9.1", ""):
        assert Compiler.find(odd, interpreters) is None


@pytest.mark.parametrize("script", ["exit 1", "echo no JSON", "exec python3 $@", "sleep 0; echo '{}'"])
def test_an_interpreter_that_does_not_work_is_told(tmp_path, script):
    program = tmp_path / "3.9/bin/python3.9"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with pytest.raises(InvalidSettings, match="WHEEL_COMPILERS"):
        Compiler.find("3.9", tmp_path)


def test_one_of_another_version_is_told(interpreters, tmp_path):
    program = tmp_path / "3.9/bin/python3.9"
    program.parent.mkdir(parents=True)
    program.symlink_to(interpreters / "3.13/bin/python3.13")
    with pytest.raises(InvalidSettings, match=r"interpreter of 3\.9"):
        Compiler.find("3.9", tmp_path)

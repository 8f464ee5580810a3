"""Pythons of other versions than the tests' own, of other Debian releases; they run on this machine."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from scripts.base_image import INTERPRETERS, NoMirror, interpreter_image
from scripts.machine import native_platform


@pytest.fixture(scope="session")
def interpreters(tmp_path_factory):
    """A folder as WHEEL_COMPILERS names it."""
    folder = tmp_path_factory.mktemp("interpreters")
    for python in INTERPRETERS:
        try:
            layout = interpreter_image(python, native_platform())
        except (NoMirror, FileNotFoundError) as error:
            pytest.skip(f"no interpreter of another version can be made here: {error}")
        root = folder / f"root-{python}"
        (layer,) = layout.parent.glob(f"{layout.name}.tar.gz")
        root.mkdir()
        subprocess.run(["tar", "-xzf", layer, "-C", root, "--exclude=./dev/*"], check=True)
        (loader,) = {path.resolve() for path in root.glob("usr/lib/*/ld-linux-*.so.*")}
        paths = ":".join(str(path) for path in root.glob("usr/lib/*-linux-gnu*"))
        # Its own C library, whatever this machine's is. In the image relocate.py does that.
        start = shlex.join([str(loader), "--library-path", paths, str(root / "usr/bin" / f"python{python}")])
        program = folder / python / "bin" / f"python{python}"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nexec {start} "$@"\n')
        program.chmod(0o755)
    return folder

"""The layer that is an environment without packages, beside what Python's own venv makes."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import venv

from builder.reference import Digest
from builder.wheels.install import venv_layer
from tests.wheels.made import PYTHON


def test_the_layer_equals_what_python_s_venv_makes(tmp_path):
    layer, blob = venv_layer(sys._base_executable, PYTHON)
    assert layer.digest == Digest.of(blob.content)
    assert layer.size == len(blob.content)
    with tarfile.open(fileobj=io.BytesIO(blob.content), mode="r:gz") as archive:
        # Debian 12's Python 3.11.2 has no filters yet, and 3.12 asks for one.
        archive.extractall(tmp_path / "ours", **({"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}))
        assert {(member.uid, member.gid, member.mtime) for member in archive} == {(0, 0, 315619200)}
    ours = tmp_path / "ours" / "opt" / "model"
    venv.EnvBuilder(with_pip=False, symlinks=True).create(tmp_path / "theirs")

    def settings(folder):
        lines = (folder / "pyvenv.cfg").read_text().splitlines()
        return dict(line.split(" = ", 1) for line in lines)

    told = settings(tmp_path / "theirs")
    assert settings(ours) == {key: value for key, value in told.items() if key in settings(ours)} | {"version": PYTHON}
    assert (ours / "lib" / f"python{PYTHON}" / "site-packages").is_dir()
    for name in ("python", "python3", f"python{PYTHON}"):
        asked = (
            "import sys; print(sys.prefix, sys.prefix != sys.base_prefix, [p for p in sys.path if 'site-pack' in p])"
        )
        said = subprocess.run(
            [ours / "bin" / name, "-I", "-c", asked], check=True, text=True, capture_output=True
        ).stdout.strip()
        assert said == f"{ours} True ['{ours}/lib/python{PYTHON}/site-packages']"


def test_it_is_the_same_for_the_same_interpreter():
    assert venv_layer("/usr/bin/python3.11", "3.11") == venv_layer("/usr/bin/python3.11", "3.11")
    assert venv_layer("/usr/bin/python3.11", "3.11")[0] != venv_layer("/usr/local/bin/python3.11", "3.11")[0]

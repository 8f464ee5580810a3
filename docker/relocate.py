# ruff: noqa: INP001, S607, T201  # a program of the build stage, not a part of the package
"""Make the Python that runs this file live under one folder, with its loader and every library it needs.

Kaniko runs RUN steps in its own root: it deletes, and overwrites with the base image, everything outside /kaniko,
/lib64 and the C library included. What goes on running there must not need anything else. So the interpreter and the
standard library are copied below ROOT, the loader and the shared libraries beside them, and the interpreter's ELF
header is changed (patchelf) to name that loader and that folder. No wrapper: a Kaniko image has no shell to run one.

    python relocate.py python ROOT      copies the interpreter to ROOT/python and its libraries to ROOT/lib
    python relocate.py libraries ROOT   copies the libraries that ROOT/venv's compiled modules and programs need, and
                                        makes the programs use the loader below ROOT
    python relocate.py compilers ROOT   makes the interpreters that compiler.py left in ROOT/compilers run there, and
                                        shares with ROOT/lib what they can share
    python relocate.py certificates ROOT  copies the system's CA certificates to ROOT/ssl/certs
    ROOT/venv/bin/python relocate.py check ROOT   imports every compiled module; fails if a file outside ROOT is mapped

Used by the Dockerfile, in its build stage; it needs nothing but the standard library and, for `python`, patchelf.
"""

from __future__ import annotations

import ctypes
import filecmp
import importlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
from pathlib import Path

VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
# Parts of the standard library that a program without a terminal, a display or a compiler has no use for.
LEFT_OUT = shutil.ignore_patterns(
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "tkinter",
    "turtle.py",
    "turtledemo",
    "lib2to3",
    "pydoc_data",
    "distutils",
    "ensurepip",
    "config-*",
    "site-packages",
    "dist-packages",
    "*.a",
    "_test*.so",
    "_tkinter*.so",
    "_dbm*.so",
    "_gdbm*.so",
    "nis*.so",
    "readline*.so",
    "xxlimited*.so",
    "sitecustomize.py",
    "EXTERNALLY-MANAGED",
)

# The parts of the GNU C library; all in use have to be of one version.
C_LIBRARY = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1")


def output(*argv: str | Path, **environ: str) -> str:
    """Return what a program writes to stdout."""
    return subprocess.run(
        argv, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environ}
    ).stdout.strip()


def is_elf(path: Path) -> bool:
    """Return whether a file is a program or a shared library."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def needed(loader: str, path: Path) -> dict[str, Path]:
    """Return the libraries that the system's loader takes for a program or library, by the name it asks for."""
    lines = output(loader, path, LD_TRACE_LOADED_OBJECTS="1").splitlines()
    missing = [line.strip() for line in lines if "not found" in line]
    if missing:
        sys.exit(f"{path} needs libraries that this image does not have: {', '.join(missing)}")
    found = (re.fullmatch(r"\s*(\S+) => (/\S+) \(0x[0-9a-f]+\)", line) for line in lines)
    return {Path(match[1]).name: Path(match[2]) for match in found if match}


def copy_libraries(loader: str, files: list[Path], root: Path) -> None:
    """Copy to ROOT/lib what `files` need and ROOT does not hold."""
    (root / "lib").mkdir(parents=True, exist_ok=True)
    for file in files:
        for name, library in needed(loader, file).items():
            inside = library.resolve().is_relative_to(root.resolve())
            if not inside and not (root / "lib" / name).exists():
                shutil.copy2(library.resolve(), root / "lib" / name)


def compiled(*folders: Path) -> list[Path]:
    """Return the shared libraries below some folders, ordered."""
    found = {path for folder in folders for path in folder.rglob("*.so*") if path.is_file() and not path.is_symlink()}
    return sorted(path for path in found if is_elf(path))


def system_loader() -> str:
    """Return the loader that the running interpreter was started with."""
    return output("patchelf", "--print-interpreter", Path(sys.executable).resolve())


def relocate_python(root: Path) -> None:
    """Copy the running interpreter and its standard library to ROOT/python, its libraries to ROOT/lib."""
    loader = system_loader()
    home = root / "python"
    program = home / "bin" / VERSION
    program.parent.mkdir(parents=True)
    shutil.copy2(Path(sys.executable).resolve(), program)
    (program.parent / "python3").symlink_to(VERSION)
    library = home / "lib" / VERSION
    shutil.copytree(sysconfig.get_path("stdlib"), library, ignore=LEFT_OUT, symlinks=False)
    dynload = Path(sysconfig.get_path("platstdlib")) / "lib-dynload"
    shutil.copytree(dynload, library / "lib-dynload", ignore=LEFT_OUT, symlinks=False, dirs_exist_ok=True)
    copy_libraries(loader, [program, *compiled(library)], root)
    # The C library loads this one by itself when a thread ends early.
    for name, path in needed_by_name(loader, "libgcc_s.so.1").items():
        shutil.copy2(path, root / "lib" / name)
    own_loader = root / "lib" / Path(loader).name
    shutil.copy2(Path(loader).resolve(), own_loader)
    # --force-rpath: a RUNPATH holds for the program alone, an RPATH also for the libraries that it loads later.
    subprocess.run(
        ["patchelf", "--set-interpreter", own_loader, "--force-rpath", "--set-rpath", root / "lib", program], check=True
    )


def relocate_programs(root: Path) -> None:
    """Make the compiled programs of ROOT/venv (uv is one) use the loader and the libraries below ROOT."""
    loader = system_loader()
    for path in sorted((root / "venv" / "bin").iterdir()):
        if path.is_file() and not path.is_symlink() and is_elf(path):
            if not output("patchelf", "--print-needed", path):
                continue  # it is linked statically
            copy_libraries(loader, [path], root)
            own_loader = root / "lib" / Path(output("patchelf", "--print-interpreter", path)).name
            subprocess.run(
                ["patchelf", "--set-interpreter", own_loader, "--force-rpath", "--set-rpath", root / "lib", path],
                check=True,
            )


def relocate_compilers(root: Path) -> None:
    """Make the interpreters in ROOT/compilers run where they are; the one of this version is not needed there.

    A library that is in ROOT/lib is not kept twice. Nor is a C library that is not newer than the one there, which
    serves programs that were made for an older one.
    """
    system = needed(system_loader(), Path(sys.executable).resolve())["libc.so.6"].parent
    (own_loader,) = (root / "lib").glob("ld-*")
    for home in sorted((root / "compilers").iterdir()):
        if f"python{home.name}" == VERSION:
            shutil.rmtree(home)
            continue
        libraries, program, loader = home / "lib", home / "bin" / f"python{home.name}", home / "lib" / "ld.so"
        if c_library(libraries) <= c_library(root / "lib"):
            for library in sorted(path for path in libraries.iterdir() if path.name in C_LIBRARY):
                if not (root / "lib" / library.name).exists():
                    shutil.copy2((system / library.name).resolve(), root / "lib" / library.name)
                library.unlink()
            loader.unlink()
            loader = own_loader
        for library in sorted(path for path in libraries.iterdir() if path.is_file()):
            shared = root / "lib" / library.name
            if shared.is_file() and filecmp.cmp(shared, library, shallow=False):
                library.unlink()
        paths = f"{libraries}:{root / 'lib'}"
        subprocess.run(
            ["patchelf", "--set-interpreter", loader, "--force-rpath", "--set-rpath", paths, program], check=True
        )
        statement = "import json, resource, signal, zlib; print(open('/proc/self/maps').read())"
        mapped = output(program, "-S", "-s", "-B", "-c", statement)
        outside = [line for line in mapped.splitlines() if ".so" in line and f" {root}/" not in line]
        if outside:
            sys.exit(f"{program} uses libraries from outside {root}: {outside}")


def c_library(folder: Path) -> int:
    """Return the minor version of the GNU C library in a folder: 36 for 2.36."""
    return max(map(int, re.findall(rb"GLIBC_2\.([0-9]+)\0", (folder / "libc.so.6").read_bytes())))


def needed_by_name(loader: str, name: str) -> dict[str, Path]:
    """Return where the system's loader finds a library, and nothing where it does not."""
    try:
        lines = output(loader, "--preload", name, Path(sys.executable).resolve(), LD_TRACE_LOADED_OBJECTS="1")
    except subprocess.CalledProcessError:
        return {}
    match = re.search(rf"\s*{re.escape(name)} => (/\S+) \(0x", lines)
    return {name: Path(match[1]).resolve()} if match else {}


def copy_certificates(root: Path) -> None:
    """Copy the system's CA certificates to ROOT/ssl/certs: as one file, and as the hashed names that OpenSSL looks up.

    The hashed names are made here: not every base image has them.
    """
    source, target = Path("/etc/ssl/certs/ca-certificates.crt"), root / "ssl" / "certs"
    if not source.is_file():
        sys.exit(f"{source} is missing: PYTHON_IMAGE needs the package ca-certificates.")
    target.mkdir(parents=True)
    shutil.copyfile(source, target / source.name)
    for certificate in re.findall(
        r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", source.read_text(), re.DOTALL
    ):
        name = subject_hash(root, ssl.PEM_cert_to_DER_cert(certificate))
        number = next(number for number in range(100) if not (target / f"{name}.{number}").exists())
        (target / f"{name}.{number}").write_text(certificate)


def subject_hash(root: Path, der: bytes) -> str:
    """Return the name under which OpenSSL looks a certificate up (X509_subject_name_hash(3))."""
    crypto = ctypes.CDLL(str(next((root / "lib").glob("libcrypto.so.*"))))
    crypto.d2i_X509.restype = ctypes.c_void_p
    crypto.X509_subject_name_hash.restype = ctypes.c_ulong
    crypto.X509_subject_name_hash.argtypes = [ctypes.c_void_p]
    start = ctypes.c_char_p(der)
    return f"{crypto.X509_subject_name_hash(crypto.d2i_X509(None, ctypes.byref(start), ctypes.c_long(len(der)))):08x}"


def check(root: Path) -> None:
    """Import every compiled module, and fail if that needed a library from outside ROOT."""
    for folder in map(Path, sys.path):
        for path in folder.rglob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"):
            name = ".".join(path.relative_to(folder).parts).split(".cpython-")[0]
            try:
                importlib.import_module(name)
            except Exception as error:  # noqa: BLE001  # some want to be imported by their package, or another system
                print(f"not imported: {name}: {type(error).__name__}: {error}", file=sys.stderr)
    mapped = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    outside = sorted(path.strip() for path in mapped if not Path(path.strip()).is_relative_to(root) and ".so" in path)
    if outside:
        sys.exit(f"Libraries from outside {root} are in use: {', '.join(outside)}")


def main() -> None:
    """Do what the first argument says, below the folder that the second one names."""
    what, root = sys.argv[1], Path(sys.argv[2])
    if what == "python":
        relocate_python(root)
    elif what == "libraries":
        copy_libraries(system_loader(), compiled(root / "venv", root / "python"), root)
        relocate_programs(root)
    elif what == "compilers":
        relocate_compilers(root)
    elif what == "certificates":
        copy_certificates(root)
    elif what == "check":
        check(root)
    else:
        sys.exit(f"{what!r} is not python, libraries, compilers, certificates or check")


if __name__ == "__main__":
    main()

"""Finish a root folder that mmdebstrap extracted: `python scripts/debian_rootfs.py ROOT`, as its extract hook.

mmdebstrap's variant `extract` unpacks packages for any architecture within seconds, and runs nothing of them, so no
emulation is needed. What their maintainer scripts would have done, as far as an image of Python needs it, is done here:
users and groups, the certificate bundle, dpkg's record of what is installed (so that apt-get works), bytecode.
"""

from __future__ import annotations

import hashlib
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

_STRIPPED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian", "var/log")
_PYTHON_FOLDERS = ("usr/lib/python3.11", "usr/lib/python3")
_APT_USER = "_apt:x:42:65534::/nonexistent:/usr/sbin/nologin\n"


def finish(root: Path, bytecode: Path) -> None:
    """Make `root` the root of an image in which Python, pip and apt-get work.

    Args:
        root: the folder that packages were extracted to; apt's archive folder still holds them.
        bytecode: folder of bytecode that was compiled before; it does not depend on the architecture.
    """
    _record_packages(root)
    _write_users(root)
    _write_certificates(root)
    for name in _STRIPPED:
        shutil.rmtree(root / name, ignore_errors=True)
    (root / "var/log/apt").mkdir(parents=True)
    # Debian's mark says that pip must leave the system's packages alone: in an image there is nobody else.
    (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
    (root / "usr/bin/python").symlink_to("python3")
    _link(root / "usr/bin/awk", "mawk")
    # An engine mounts its own; what mmdebstrap put there is this machine's.
    (root / "etc/resolv.conf").write_text("")
    (root / "etc/hostname").write_text("localhost\n")
    _compile(root, bytecode)


def _record_packages(root: Path) -> None:
    """Write what dpkg would have: every package as installed, with its files and its maintainer scripts."""
    info = root / "var/lib/dpkg/info"
    status = []
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        control = root / "tmp/control"
        subprocess.run(["dpkg-deb", "--control", str(package), str(control)], check=True)
        text = (control / "control").read_text()
        fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line and line[0] != " ")
        first, _, rest = text.partition("\n")
        status.append(f"{first}\nStatus: install ok installed\n{rest}")
        same = fields.get("Multi-Arch") == "same"
        stem = f"{fields['Package']}:{fields['Architecture']}" if same else fields["Package"]
        loader = _loader(root) if fields["Package"] == "libc6" else []
        (info / f"{stem}.list").write_text("\n".join(["/.", *_files(control), *loader, ""]))
        for script in control.iterdir():
            if script.name not in {"control", "conffiles"}:
                script.rename(info / f"{stem}.{script.name}")
        shutil.rmtree(control)
    with (root / "var/lib/dpkg/status").open("a") as file:
        file.write("\n".join(["", *status]))


def _files(control: Path) -> list[str]:
    """Return the files that a package's control files name: all but folders and links, and no archive is unpacked."""
    sums, settings = control / "md5sums", control / "conffiles"
    named = [f"/{line.split(maxsplit=1)[1]}" for line in sums.read_text().splitlines()] if sums.exists() else []
    return named + (settings.read_text().splitlines() if settings.exists() else [])


def _loader(root: Path) -> list[str]:
    """Return the C library's folder and link outside its own folder: an upgrade removes a /lib64 that nobody owns."""
    links = sorted(f"/lib64/{path.name}" for path in (root / "usr/lib64").glob("ld*"))
    return ["/lib64", *links] if links else []


def _write_users(root: Path) -> None:
    masters = root / "usr/share/base-passwd"
    users = (masters / "passwd.master").read_text().replace("root:*:", "root:x:") + _APT_USER
    (root / "etc/passwd").write_text(users)
    (root / "etc/group").write_text((masters / "group.master").read_text())
    names = [line.split(":")[0] for line in users.splitlines()]
    shadow = root / "etc/shadow"
    shadow.write_text("".join(f"{name}:*:19000:0:99999:7:::\n" for name in names))
    shadow.chmod(0o640)
    for name in ("root", "tmp", "var/tmp", "home"):
        (root / name).mkdir(exist_ok=True)


def _write_certificates(root: Path) -> None:
    """Write the bundle of the authorities that ca-certificates brings, as update-ca-certificates does."""
    certificates = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
    bundle = "".join(f"{path.read_text().rstrip()}\n" for path in certificates)
    (root / "etc/ssl/certs/ca-certificates.crt").write_text(bundle)
    names = "".join(f"{path.relative_to(root / 'usr/share/ca-certificates')}\n" for path in certificates)
    (root / "etc/ca-certificates.conf").write_text(names)


def _compile(root: Path, bytecode: Path) -> None:
    """Add bytecode where this interpreter is of the image's version; else Python compiles as it goes."""
    if sys.version_info[:2] != (3, 11):
        return
    for source in sorted(path for name in _PYTHON_FOLDERS for path in (root / name).rglob("*.py")):
        shown = f"/{source.relative_to(root)}"
        key = hashlib.sha256(shown.encode() + b"\0" + source.read_bytes()).hexdigest()
        compiled = bytecode / f"{key}.pyc"
        target = source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
        target.parent.mkdir(exist_ok=True)
        if not compiled.exists():
            # By hash, unchecked: modification times of the image's files are all made the same.
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(str(source), str(target), dfile=shown, invalidation_mode=mode, quiet=2)
            if not target.exists():  # a file that is not meant to be valid, such as a test's
                continue
            part = compiled.with_suffix(f".{root.name}")
            shutil.copyfile(target, part)
            part.rename(compiled)
        else:
            shutil.copyfile(compiled, target)


def _link(path: Path, target: str) -> None:
    if not path.exists() and (path.parent / target).exists():
        path.symlink_to(target)


if __name__ == "__main__":
    finish(Path(sys.argv[1]), Path(sys.argv[2]))

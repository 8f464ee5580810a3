"""The layer that makes /opt/model a virtual environment on the base's interpreter; it holds no package."""

from __future__ import annotations

from posixpath import dirname

from builder.build.wheel_files import ENVIRONMENT
from builder.images.blob import BytesBlob
from builder.images.layer import Layer, LayerWriter, Plain


def venv_layer(interpreter: str, python: str) -> tuple[Layer, BytesBlob]:
    """Return the layer of an environment without packages, and its content.

    It is what `python -m venv --without-pip` leaves, as far as Python reads it
    (https://docs.python.org/3/library/site.html: pyvenv.cfg).

    Args:
        interpreter: the base's interpreter, an absolute path.
        python: its version, `3.11`.
    """
    config = f"home = {dirname(interpreter)}\ninclude-system-site-packages = false\nversion = {python}\n".encode()
    writer = LayerWriter()
    chunks = [
        *writer.symlink(f"{ENVIRONMENT}/bin/python", interpreter),
        *writer.symlink(f"{ENVIRONMENT}/bin/python3", "python"),
        *writer.symlink(f"{ENVIRONMENT}/bin/python{python}", "python"),
        *writer.directory(f"{ENVIRONMENT}/lib/python{python}/site-packages"),
        *writer.file(f"{ENVIRONMENT}/pyvenv.cfg", Plain(chunks=[config], size=len(config))),
        *writer.finish(),
    ]
    return writer.layer, BytesBlob(b"".join(chunks))

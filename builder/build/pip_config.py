"""The pip.conf that RUN steps see: the user's, with the CA bundle and the index that the environment names."""

from __future__ import annotations

import configparser
import io
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import InvalidSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from builder.build.engine import Network

_NAMED = re.compile(r"^[A-Za-z0-9._-]+=(?=[a-z]+://)")
# pip's own environment variables and the keys that they stand for (https://pip.pypa.io/en/stable/topics/configuration/).
_KEYS = {
    "PIP_INDEX_URL": "index-url",
    "PIP_EXTRA_INDEX_URL": "extra-index-url",
    "PIP_TRUSTED_HOST": "trusted-host",
}


def certificate(network: Network) -> Path | None:
    """Return the CA bundle that pip has to trust: the one that pip.conf names, else the network's; None for neither.

    Raises:
        InvalidSettings: pip.conf cannot be read, or names a file that is not there.
    """
    named = _read(network).get("global", "cert", fallback="")
    if not named:
        return network.ca_bundle
    if not Path(named).is_file():
        message = f"PIP_CONFIG_FILE {network.pip_config} says cert = {named}, which is not a file here."
        raise InvalidSettings(message, remedy="Name a file that the build phase can read, or set SSL_CERT_FILE.")
    return Path(named)


def copy_bundle(source: Path, target: Path) -> None:
    """Copy a CA bundle to where every RUN step can read it, whatever user it runs as.

    Raises:
        InvalidSettings: it cannot be read.
    """
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        message = f"The CA bundle {source} cannot be read: {error.strerror}."
        raise InvalidSettings(message, remedy="Name a readable file of certificates in SSL_CERT_FILE.") from error
    target.chmod(0o644)


def default_index(variables: Mapping[str, str]) -> str:
    """Return the address of the index that uv's variables name as the default one; empty for none."""
    # UV_DEFAULT_INDEX may give it a name, as in `name=https://…`.
    default = variables.get("UV_DEFAULT_INDEX") or variables.get("UV_INDEX_URL") or ""
    return _NAMED.sub("", default)


def pip_config(network: Network, seen_certificate: str) -> str:
    """Return the text of a pip.conf; empty where there is nothing to say.

    Args:
        network: what the environment names.
        seen_certificate: the path under which a RUN step finds the file `certificate` names; empty for none.

    Raises:
        InvalidSettings: PIP_CONFIG_FILE cannot be read.
    """
    parser = _read(network)
    values = {key: network.index_variables[name] for name, key in _KEYS.items() if name in network.index_variables}
    named = any(parser.has_option("global", key) for key in ("index-url", "index_url"))
    if not named and "index-url" not in values and (default := default_index(network.index_variables)):
        # Who speaks uv's words has one index for all, and the built-in template installs with pip. Further indexes are
        # not handed on so: pip would take a package from any of them, where uv takes it from the first that has it.
        values["index-url"] = default
    if seen_certificate:
        values["cert"] = seen_certificate
    if values and not parser.has_section("global"):
        parser.add_section("global")
    for key, value in values.items():
        parser.set("global", key, "\n".join(value.split()) if key != "cert" else value)
    text = io.StringIO()
    parser.write(text)
    return text.getvalue()


def pip_options(network: Network) -> dict[str, str]:
    """Return the options that pip.conf and pip's own environment variables give to `pip install`, by their long names.

    Raises:
        InvalidSettings: PIP_CONFIG_FILE cannot be read.
    """
    parser = _read(network)
    options = {
        key.replace("_", "-").removeprefix("--"): value
        for section in ("global", "install")
        if parser.has_section(section)
        for key, value in parser.items(section)
    }
    variables = network.index_variables.items()
    return options | {name[4:].lower().replace("_", "-"): value for name, value in variables if name.startswith("PIP_")}


def _read(network: Network) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    if network.pip_config is None:
        return parser
    try:
        parser.read_string(network.pip_config.read_text())
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        message = f"PIP_CONFIG_FILE {network.pip_config} cannot be read: {type(error).__name__}."
        raise InvalidSettings(message, remedy="Name a file in pip's own format.") from error
    return parser

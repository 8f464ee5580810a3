"""Errors of MLflow and of artifact stores, in our words."""

from __future__ import annotations

import errno
import posixpath
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from builder.errors import (
    BuilderError,
    InvalidSettings,
    InvalidVersion,
    PermissionRefused,
    ServiceUnavailable,
    TryAgain,
    VersionNotFound,
)
from builder.masking import masked, one_line

_SHOWN = 200
_ENDPOINT = "/mlflow-artifacts/artifacts"


@contextmanager
def naming_refused(repository: Any, path: str) -> Iterator[None]:
    """Turn MLflow's refusal of a name in a listing into an error that names the artifact; all else passes.

    Args:
        repository: MLflow's artifact repository of a folder that the server hands on.
        path: of the folder that is listed, below it.

    Raises:
        InvalidVersion: an artifact's name has a backslash, leaves its folder, or cannot be used otherwise.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if "Invalid path" not in str(error):
            raise
        name = _refused(repository, path)
        if name is None:
            raise
        why = "a backslash" if "\\" in name else "characters that MLflow's client does not take"
        message = f"The artifact {one_line(posixpath.join(path, name), _SHOWN)!r} cannot be read: its name has {why}."
        raise InvalidVersion(
            message, remedy="Log the file under another name, and register the model again."
        ) from error


def _refused(repository: Any, path: str) -> str | None:
    """Return the first name of a folder that MLflow's client does not take; None where the server lists none."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import augmented_raise_for_status, http_request
    from mlflow.utils.uri import validate_path_is_safe

    url, _, root = repository.artifact_uri.partition(_ENDPOINT)
    parameters = {"path": posixpath.join(root.lstrip("/"), path)}
    answer = http_request(get_default_host_creds(url), _ENDPOINT, "GET", params=parameters)
    augmented_raise_for_status(answer)
    for file in answer.json().get("files", []):
        try:
            validate_path_is_safe(file["path"])
        except MlflowException:
            return str(file["path"])
    return None


# A store on this machine: a file is gone, or a link leads nowhere or in a circle.
_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED_STATUS = frozenset({401, 403, 407})
_GONE_STATUS = frozenset({404, 410})
_UNPROCESSABLE = 400
_REFUSED_CODES = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"})
_GONE_CODES = frozenset({"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"})
_INPUT_CODES = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"})
# botocore's ClientError carries S3's own words.
_REFUSED_WORDS = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403", "401"}
)
_GONE_WORDS = frozenset({"NoSuchKey", "NoSuchBucket", "404"})
# Errors of urllib3 and botocore by name: both are loaded only where they are used.
_NO_CREDENTIAL = re.compile(r"(?:No|Partial)Credentials?(?:Retrieval)?Error|.*TokenLoadError|ProfileNotFound")
_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed", re.IGNORECASE)
_OPTIONAL = {
    "boto3": "s3",
    "botocore": "s3",
}
_LONGEST_REASON = 400
_STATUS_IN_TEXT = re.compile(r"failed with error code (\d{3})\b|^(\d{3}) (?:Client|Server) Error")


@contextmanager
def answering(what: str, *, server: str, gone: type[BuilderError] = VersionNotFound) -> Iterator[None]:
    """Turn whatever MLflow's client or an artifact store raises inside the block into our errors.

    Args:
        what: the request, as it goes on after "could not": `find model 'x' version 3`.
        server: the server, by the name of its setting or by its address: `MLFLOW_TRACKING_URI (https://…)`.
        gone: the error for something that does not exist.

    Raises:
        ServiceUnavailable: the server is away, answers 5xx, or a page instead of an answer.
        PermissionRefused: a credential is missing or refused.
        VersionNotFound: there is no such thing; or whatever `gone` is.
        InvalidVersion: the server does not accept the request.
        InvalidSettings: a certificate is not trusted, a package for this kind of artifact store is missing, or the
            tracking URI is not an address.
        TryAgain: the disk is full.
    """
    try:
        yield
    except BuilderError:
        raise
    except Exception as error:
        raise _ours(error, what, server, gone) from error


@contextmanager
def on_disk(what: str) -> Iterator[None]:
    """Turn an operating system's refusal to read or write our own files into our errors.

    Args:
        what: what is done, as it goes on after "could not".

    Raises:
        TryAgain: the disk is full.
        InvalidSettings: anything else, such as a folder that may not be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _full(what) from error
        message = f"Could not {what}: {one_line(str(error), _LONGEST_REASON)}."
        raise InvalidSettings(message, remedy="Name a folder that this user may write to.") from error


def _full(what: str) -> TryAgain:
    return TryAgain(f"Could not {what}: the disk is full.", remedy="Free space, or use a larger disk.")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and all that it came from, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__context__, one.__cause__]


def _ours(error: Exception, what: str, server: str, gone: type[BuilderError]) -> BuilderError:
    """Return our error for a foreign one: what is surest first."""
    chain = list(_chain(error))
    reason = one_line(masked(f"{type(error).__name__}: {error}"), _LONGEST_REASON).rstrip(".")
    failed = f"Could not {what}: {reason}"
    if any(isinstance(one, OSError) and one.errno in _NO_SPACE for one in chain):
        return _full(what)
    missing = next((one for one in chain if isinstance(one, ModuleNotFoundError)), None)
    if missing:
        extra = _OPTIONAL.get((missing.name or "").partition(".")[0])
        return InvalidSettings(
            f"Could not {what}: this kind of artifact store needs the Python package {missing.name!r}.",
            remedy=f"Install model-image-builder[{extra}]." if extra else "Install it beside model-image-builder.",
        )
    if any(isinstance(one, ssl.SSLCertVerificationError) or _CERTIFICATE.search(str(one)) for one in chain):
        return InvalidSettings(
            f"{failed}.", remedy=f"The certificate of {server} is not trusted. Name its CA bundle by SSL_CERT_FILE."
        )
    code = _code(chain)
    status = _status(chain)
    if code in _REFUSED_CODES or status in _REFUSED_STATUS or _is_refusal(chain):
        return PermissionRefused(f"{failed}.", remedy=f"Check the credential for {server}, and what it may do.")
    # MLflow says RESOURCE_DOES_NOT_EXIST; a 404 without that is another server's, or a wrong path.
    if code in _GONE_CODES or any(_client_error(one) in _GONE_WORDS for one in chain):
        return gone(f"{failed}.", remedy="Check the name and the version.")
    no_file = isinstance(error, OSError) and error.errno in _NO_FILE
    if gone is not VersionNotFound and (no_file or status in _GONE_STATUS):
        return gone(f"{failed}.", remedy="Log the file again, or register the model again.")
    if _is_no_address(chain):
        return InvalidSettings(f"{failed}.", remedy="MLFLOW_TRACKING_URI is a URI such as https://mlflow.example.com.")
    if code in _INPUT_CODES and status in {None, _UNPROCESSABLE}:
        return InvalidVersion(f"{failed}.", remedy="Correct what the server's message names.")
    return ServiceUnavailable(f"{failed}.", remedy=f"Check that {server} is right and that the server is up.")


def _code(chain: list[BaseException]) -> str:
    """Return MLflow's error code, where the exception or one beneath it has one that says something."""
    codes = [str(one.error_code) for one in chain if hasattr(one, "error_code")]
    return next((code for code in codes if code != "INTERNAL_ERROR"), "")


def _status(chain: list[BaseException]) -> int | None:
    """Return the HTTP status that an exception or one beneath it carries, or names in its text."""
    for one in chain:
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        if match := _STATUS_IN_TEXT.search(str(one)):
            return int(match[1] or match[2])
    return next((status for one in chain if (status := _status_in_frames(one))), None)


def _status_in_frames(error: BaseException) -> int | None:
    """Return the status of the response that an exception was raised over.

    Where the body is JSON, a gateway's for instance, MLflow raises `RestException` with what it reads there and drops
    the status: `get_http_status_code` is then 500, whatever the server answered. Every release from 2.20 to 3.17 does
    that, and the response is left only in the frame of the function that raised.
    """
    for frame, _ in walk_tb(error.__traceback__):
        status = getattr(frame.f_locals.get("response"), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _client_error(error: BaseException) -> str:
    """Return the error code of a botocore ClientError; the empty string for any other exception."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return ""
    return str(response.get("Error", {}).get("Code", ""))


def _is_refusal(chain: list[BaseException]) -> bool:
    return any(
        _client_error(one) in _REFUSED_WORDS
        or _NO_CREDENTIAL.fullmatch(type(one).__name__)
        or isinstance(one, PermissionError)
        for one in chain
    )


def _is_no_address(chain: list[BaseException]) -> bool:
    names = {"InvalidUrlException", "UnsupportedModelRegistryStoreURIException", "MissingSchema", "InvalidURL"}
    return any(type(one).__name__ in names for one in chain)

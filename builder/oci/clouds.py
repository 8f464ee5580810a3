"""Credentials of the clouds' registries, by the identity that the cloud gives to a Pod's service account.

Each is asked for only where the registry's host is that cloud's and the cloud's variables of a workload identity are
set; see docs/decisions/0055-cloud-credentials.md.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from builder.errors import BuilderError, InvalidSettings, PermissionRefused, ServiceUnavailable
from builder.http import Client, Retry, RetryPolicy, ServerKind, is_transient, retried
from builder.masking import mask_token, one_line
from builder.oci import Malformed, from_bytes
from builder.oci.authn import Credential
from builder.reference import is_loopback

IDENTITY = ServerKind(
    name="identity service",
    unreachable="Check the workload identity of the service account, and that the network leads there.",
    unexpected="Check the workload identity of the service account.",
    plain="It must speak TLS.",
)
# https://docs.aws.amazon.com/AmazonECR/latest/userguide/registry_auth.html, dual-stack and FIPS endpoints included.
_ECR = re.compile(
    r"[0-9]{12}\.dkr[.-]ecr(?:-fips)?\.(?P<region>[a-z0-9-]+)\."
    r"(?:amazonaws\.com(?:\.cn)?|amazonaws\.eu|on\.aws|on\.amazonwebservices\.com\.cn)"
)
# https://learn.microsoft.com/azure/container-registry/
_ACR = re.compile(r"[a-z0-9-]+\.azurecr\.(?:io|cn|us)")
# https://cloud.google.com/artifact-registry/docs/docker/authentication
_GOOGLE = re.compile(r"(?:[a-z0-9-]+-docker\.pkg\.dev|(?:[a-z]+\.)?gcr\.io)")
_AMAZON, _AZURE, _GOOGLE_CLOUD = "AWS", "Azure", "Google"
_AZURE_AUTHORITY = "https://login.microsoftonline.com"
_AZURE_SCOPE = "https://containerregistry.azure.net/.default"
_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_GOOGLE_TOKEN = "/computeMetadata/v1/instance/service-accounts/default/token"  # noqa: S105 -- a path
_MOST_BYTES = 1 << 20
_MARGIN = 300.0
_DEFAULT_SECONDS = 3600.0


@dataclass(frozen=True)
class _Wanted:
    """What is asked for: of which cloud, for which registry, and the name of the token in the answer."""

    cloud: str
    host: str
    name: str = "access_token"


@dataclass(frozen=True, kw_only=True)
class CloudIdentity:
    """Finds credentials of the clouds' registries.

    Attributes:
        variables: of the environment: the AWS_ and AZURE_ ones that name an identity, and GCE_METADATA_HOST.
        ca_bundle: file of the authorities to trust, in PEM; None for the system's.
        proxies: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, those that are set.
        policy: how often and how long a request is tried.
        origin: gives the address of a registry's host.
    """

    variables: Mapping[str, str] = field(repr=False)
    ca_bundle: Path | None = None
    proxies: Mapping[str, str] = field(default_factory=dict)
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    origin: Callable[[str], str] = "https://{}".format

    def for_host(self, host: str) -> Credential | None:
        """Return a credential for a registry's host; None where there is no identity for it. It ends after hours.

        Raises:
            InvalidSettings: the identity's variables are incomplete, or a certificate is not trusted.
            PermissionRefused: the cloud refuses the identity.
            ServiceUnavailable: the cloud does not answer.
        """
        if (found := _ECR.fullmatch(host)) and self._any("AWS_WEB_IDENTITY_TOKEN_FILE", *_CONTAINER_CREDENTIALS):
            return self._amazon(host, found["region"]).masked()
        if _ACR.fullmatch(host) and self._any("AZURE_FEDERATED_TOKEN_FILE"):
            return self._azure(host).masked()
        if _GOOGLE.fullmatch(host) and self._any("GCE_METADATA_HOST"):
            return self._google(host).masked()
        return None

    def _any(self, *names: str) -> bool:
        return any(self.variables.get(name) for name in names)

    def _named(self, name: str, host: str) -> str:
        value = self.variables.get(name, "")
        if not value:
            message = f"The workload identity for {host} is incomplete: {name} is not set."
            raise InvalidSettings(message, remedy=_REMEDY)
        return value

    def _address(self, variable: str) -> str:
        """Return the address of a service that a variable names; empty where it is not set."""
        address = self.variables.get(variable, "")
        parts = urlsplit(address)
        if address and parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.netloc)):
            message = f"{variable} is not an https:// address, so no token is sent there."
            raise InvalidSettings(message, remedy="Correct it, or leave it out for the cloud's own address.")
        return address

    def _token(self, variable: str, host: str) -> str:
        """Return the token in the file that a variable names; it is renewed there, so it is read each time."""
        path = self._named(variable, host)
        try:
            token = Path(path).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            message = f"{variable} is {path!r}, which cannot be read."
            raise InvalidSettings(message, remedy=_REMEDY) from error
        mask_token(token)
        return token

    # ---- Amazon: a role's keys, and ECR's password for them

    def _amazon(self, host: str, region: str) -> Credential:
        try:
            import botocore.exceptions
            import botocore.session
        except ImportError as error:
            message = f"A credential for {host} needs the Python package botocore."
            raise InvalidSettings(message, remedy="Install model-image-builder[s3].") from error
        # Keys in the environment or in files may be those of an artifact store, and AWS_ENDPOINT_URL its address.
        session = botocore.session.Session()
        try:
            keys = self._amazon_keys(session, host, region)
            ecr = self._amazon_client(session, "ecr", region, **keys)
            (data,) = ecr.get_authorization_token()["authorizationData"]
            user, _, password = base64.b64decode(data["authorizationToken"]).decode().partition(":")
            seconds = data["expiresAt"].timestamp() - time.time()
        except botocore.exceptions.ClientError as error:
            code = one_line(str(error.response.get("Error", {}).get("Code", "")), 100)
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise _away(_AMAZON, host, code) from error
            raise _refused(_AMAZON, host, code) from error
        except botocore.exceptions.SSLError as error:
            raise _untrusted(_AMAZON, host) from error
        except botocore.exceptions.BotoCoreError as error:
            raise _away(_AMAZON, host, type(error).__name__) from error
        except (KeyError, ValueError, TypeError, binascii.Error) as error:
            raise _away(_AMAZON, host, "an answer that is not as documented") from error
        return Credential(user, password, ends=_end(seconds))

    def _amazon_keys(self, session: Any, host: str, region: str) -> dict[str, str]:  # botocore has no types
        if self._any("AWS_WEB_IDENTITY_TOKEN_FILE"):
            from botocore import UNSIGNED

            sts = self._amazon_client(session, "sts", region, signature_version=UNSIGNED)
            found = sts.assume_role_with_web_identity(
                RoleArn=self._named("AWS_ROLE_ARN", host),
                RoleSessionName=self.variables.get("AWS_ROLE_SESSION_NAME") or "model-image-builder",
                WebIdentityToken=self._token("AWS_WEB_IDENTITY_TOKEN_FILE", host),
            )["Credentials"]
            keys = (found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"])
        else:
            from botocore.credentials import ContainerProvider

            loaded = ContainerProvider(environ=dict(self.variables)).load()
            keys = tuple(loaded.get_frozen_credentials())[:3]
        for secret in keys[1:]:
            mask_token(secret)
        return dict(zip(("aws_access_key_id", "aws_secret_access_key", "aws_session_token"), keys, strict=True))

    def _amazon_client(self, session: Any, service: str, region: str, **more: Any) -> Any:
        from botocore.config import Config

        config = Config(
            ignore_configured_endpoint_urls=True,
            retries={"max_attempts": 3, "mode": "standard"},
            connect_timeout=15,
            read_timeout=60,
            **({"signature_version": more.pop("signature_version")} if "signature_version" in more else {}),
        )
        return session.create_client(
            service,
            region_name=region,
            config=config,
            endpoint_url=self._address(f"AWS_ENDPOINT_URL_{service.upper()}") or None,
            verify=str(self.ca_bundle) if self.ca_bundle else None,
            **more,
        )

    # ---- Azure: a token of Entra ID, and the registry's refresh token for it

    def _azure(self, host: str) -> Credential:
        authority = self._address("AZURE_AUTHORITY_HOST") or _AZURE_AUTHORITY
        tenant = self._named("AZURE_TENANT_ID", host)
        form = {
            "grant_type": "client_credentials",
            "client_id": self._named("AZURE_CLIENT_ID", host),
            "client_assertion_type": _ASSERTION,
            "client_assertion": self._token("AZURE_FEDERATED_TOKEN_FILE", host),
            "scope": _AZURE_SCOPE,
        }
        with Client(IDENTITY, ca_bundle=self.ca_bundle, proxies=self.proxies) as client:
            url = f"{authority.rstrip('/')}/{tenant}/oauth2/v2.0/token"
            token = self._answered(client, _Wanted(_AZURE, host), "POST", url, form)["access_token"]
            mask_token(token)
            form = {"grant_type": "access_token", "service": host, "tenant": tenant, "access_token": token}
            url = f"{self.origin(host)}/oauth2/exchange"
            wanted = _Wanted(_AZURE, host, "refresh_token")
            refresh = self._answered(client, wanted, "POST", url, form)["refresh_token"]
        return Credential(identity_token=refresh, ends=_end(_DEFAULT_SECONDS))

    # ---- Google: the token of the metadata server

    def _google(self, host: str) -> Credential:
        server = self.variables["GCE_METADATA_HOST"]
        url = f"http://{server}{_GOOGLE_TOKEN}"
        if urlsplit(url).netloc != server:
            message = f"GCE_METADATA_HOST is {server!r}, which is not a host."
            raise InvalidSettings(message, remedy="On GKE it is metadata.google.internal.")
        # Not through a proxy: the server is on the node.
        with Client(IDENTITY, ca_bundle=self.ca_bundle) as client:
            answer = self._answered(client, _Wanted(_GOOGLE_CLOUD, host), "GET", url)
        seconds = answer.get("expires_in")
        seconds = float(seconds) if isinstance(seconds, int) and 0 < seconds < 1 << 20 else _DEFAULT_SECONDS
        return Credential("oauth2accesstoken", answer["access_token"], ends=_end(seconds))

    def _answered(
        self, client: Client, what: _Wanted, method: str, url: str, form: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Return an identity service's JSON answer, in which a token is found. No redirect is followed."""
        cloud, host = what.cloud, what.host
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if form else {"Metadata-Flavor": "Google"}
        body = urlencode(form).encode() if form else None

        def ask(until: float) -> dict[str, Any]:
            response = client.send(method, url, until=until, headers=headers, body=body)
            content = response.content(_MOST_BYTES)
            if is_transient(response.status):
                raise Retry(_away(cloud, host, f"HTTP {response.status}"), retry_after=response.retry_after)
            if response.status != HTTPStatus.OK:
                raise _refused(cloud, host, f"HTTP {response.status}")
            try:
                answer = from_bytes(content)
                token = answer.get(what.name)
            except Malformed as error:
                raise _away(cloud, host, "an answer that is not JSON") from error
            if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
                raise _away(cloud, host, "an answer without a token")
            return answer

        return retried(f"Asking {cloud} for a credential for {host}", ask, policy=self.policy)


_CONTAINER_CREDENTIALS = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
_REMEDY = "Give the service account a workload identity as docs/registries.md describes, or set DOCKER_CONFIG."


def _end(seconds: float) -> float:
    """Return when to ask again, as of `time.monotonic`: some minutes before the end, or at half of a short time."""
    return time.monotonic() + max(seconds - _MARGIN, seconds / 2)


def _refused(cloud: str, host: str, why: str) -> BuilderError:
    message = f"{cloud} refuses a credential for {host} to this workload identity: {why}."
    return PermissionRefused(message, remedy="Check the identity's role, and what it may do in the registry.")


def _away(cloud: str, host: str, why: str) -> BuilderError:
    message = f"{cloud} does not answer with a credential for {host}: {why}."
    return ServiceUnavailable(message, remedy=IDENTITY.unreachable)


def _untrusted(cloud: str, host: str) -> BuilderError:
    message = f"The certificate of {cloud}'s identity service, asked for {host}, is not trusted."
    return InvalidSettings(message, remedy="Name a bundle with the authority that signed it in SSL_CERT_FILE.")

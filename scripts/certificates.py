"""Keys and certificates of a private certificate authority, for servers and clients that run for minutes."""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate and its key, as PEM files.

    Attributes:
        path: the certificate.
        key_path: its private key.
        key: the key itself.
        der: the certificate in DER.
    """

    path: Path
    key_path: Path
    key: ec.EllipticCurvePrivateKey
    der: bytes


def self_signed(folder: Path, name: str) -> Certificate:
    """Make a certificate that signs itself, as an authority or as a signer of tokens.

    Args:
        folder: where `<name>.crt` and `<name>.key` go.
        name: its common name.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, subject, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    return _write(folder, name, builder.sign(key, hashes.SHA256()), key)


def signed(
    folder: Path,
    name: str,
    authority: Certificate,
    *,
    organization: str = "",
    dns_names: Sequence[str] = (),
    addresses: Sequence[str] = (),
) -> Certificate:
    """Make a certificate signed by `authority`: a server's where it has names or addresses, else a client's.

    Args:
        folder: where `<name>.crt` and `<name>.key` go, without the colons of the name.
        name: its common name.
        authority: who signs it.
        organization: which Kubernetes takes for a client's group.
        dns_names: of the server.
        addresses: the server's IP addresses.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.load_der_x509_certificate(authority.der).subject
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if organization:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    names: list[x509.GeneralName] = [x509.DNSName(each) for each in dns_names]
    names += [x509.IPAddress(ipaddress.ip_address(each)) for each in addresses]
    usage = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(x509.Name(attributes), issuer, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        # OpenSSL's strict mode, the default from Python 3.13 on, refuses a certificate without it.
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _write(folder, name.replace(":", "-"), builder.sign(authority.key, hashes.SHA256()), key)


def for_loopback(folder: Path, authority: Certificate) -> Certificate:
    """Make a server's certificate for 127.0.0.1 and localhost, signed by `authority`."""
    return signed(folder, "localhost", authority, dns_names=["localhost"], addresses=["127.0.0.1"])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=7))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _write(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Certificate:
    folder.mkdir(parents=True, exist_ok=True)
    path, key_path = folder / f"{name}.crt", folder / f"{name}.key"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return Certificate(path=path, key_path=key_path, key=key, der=certificate.public_bytes(serialization.Encoding.DER))

"""Certificates of state channels: each receiver makes its own, and each sender trusts that one.

There is no authority and no file. A receiver's private key never leaves its process. Its
certificate goes to the sender on the way that the link's token takes; it names no address, as the
sender trusts no other certificate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

SERVER_NAME = "state-channel.twotower"
# Hosts' clocks differ, and a pair may run for long: its end is what ends a certificate.
_EARLIER, _LIFETIME = timedelta(days=2), timedelta(days=3650)


@dataclass(frozen=True)
class Identity:
    """A certificate that signs itself, and its private key; both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server that is this identity."""
        return grpc.ssl_server_credentials([(self.key, self.certificate)])


def new_identity() -> Identity:
    """A new identity on the curve P-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        # It is nobody's authority but its own.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Identity(certificate.public_bytes(serialization.Encoding.PEM), private)


def channel_credentials(certificate: bytes) -> grpc.ChannelCredentials:
    """For a gRPC channel that speaks with the owner of this certificate and nobody else.

    The channel needs the options of `TARGET_NAME` as well.
    """
    return grpc.ssl_channel_credentials(root_certificates=certificate)


TARGET_NAME = [("grpc.ssl_target_name_override", SERVER_NAME)]

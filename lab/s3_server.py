"""A real S3 server for tests: SeaweedFS, with every port on this host's loopback."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

__all__ = ["ACCESS_KEY", "SECRET_KEY", "SeaweedFS"]

ACCESS_KEY = "lab"
SECRET_KEY = "lab-secret"
_START = 120.0  # seconds on a loaded machine; 3 on an idle one


class SeaweedFS:
    """A server that runs until `stop`, or until the ``with`` block is left; its data lie in a folder of its own.

    It knows one identity (`ACCESS_KEY`, `SECRET_KEY`) and no bucket. It is reached by HTTP at `url`, and by TLS at
    `tls_url`, with a certificate that only `ca_file` vouches for.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="seaweedfs-", dir=folder))
        identity = {
            "name": "lab",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.ca_file = self.folder / "certificate.pem"
        make_certificate(self.ca_file, self.folder / "key.pem")
        for _ in range(5):  # a port that was free may be taken before the server has it
            if self._started():
                return
        said = (self.folder / "log").read_text()[-2000:]
        self.stop()
        raise RuntimeError(f"SeaweedFS does not start: {said}")

    def _started(self) -> bool:
        self._ports = free_ports(9)
        self.port, self.tls_port, *others = self._ports
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
        command = [
            str(Path(sys.executable).parent / "weed"),
            "-logtostderr",
            "server",
            f"-dir={self.folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{name}={port}" for name, port in zip(names, others, strict=False)),
            "-master.volumeSizeLimitMB=128",
            "-volume.max=2000",  # every bucket takes 7
            "-filer",
            "-s3",
            f"-s3.port={self.port}",
            f"-s3.port.https={self.tls_port}",
            f"-s3.cert.file={self.ca_file}",
            f"-s3.key.file={self.folder / 'key.pem'}",
            f"-s3.port.grpc={others[-1]}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",  # 9101, where a second server would find it taken
            "-s3.iam=false",
            f"-s3.config={self.folder / 's3.json'}",
        ]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=_environment()
            )
        end = time.monotonic() + _START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url, timeout=5)
            except urllib.error.HTTPError:  # it asks who we are
                return True
            except OSError:
                time.sleep(0.05)
        self._kill()
        return False

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_url(self) -> str:
        """The endpoint, by TLS."""
        return f"https://127.0.0.1:{self.tls_port}"

    def credentials(self, path: Path, *, key: str = ACCESS_KEY, secret: str = SECRET_KEY) -> Path:
        """Write an AWS credentials file to `path`."""
        path.touch(mode=0o600)
        path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
        return path

    def _kill(self) -> None:
        self.process.kill()  # it takes half a minute to end by itself
        self.process.wait()
        for port in self._ports:  # it has these whatever TMPDIR says
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()

    def stop(self) -> None:
        """End it, and remove its data."""
        self._kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> SeaweedFS:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def make_certificate(certificate: Path, key: Path) -> None:
    """A certificate for the loopback that is its own authority."""
    from cryptography import x509  # noqa: PLC0415 - moto brings it; nothing else of the lab needs it
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415 - as above
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - as above

    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lab")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(secret.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(secret, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on, nor gets for a connection before they are used."""
    wanted = random.sample(range(16_000, 32_000), 16_000)  # the kernel gives connections 32,768 and above
    found: list[socket.socket] = []
    try:
        while len(found) < count:
            one = socket.socket()
            try:
                one.bind(("127.0.0.1", wanted.pop()))
            except OSError:
                one.close()
            else:
                found.append(one)
        return [one.getsockname()[1] for one in found]
    finally:
        for one in found:
            one.close()


def _environment() -> dict[str, str]:
    # It would take the AWS_* variables of whoever runs the tests for identities of its own.
    return {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}

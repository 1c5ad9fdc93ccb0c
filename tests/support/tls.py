"""A self-signed certificate for 127.0.0.1."""

import subprocess
from pathlib import Path
from typing import NamedTuple


class Certificate(NamedTuple):
    certificate: Path
    key: Path


def make_certificate(directory: Path) -> Certificate:
    found = Certificate(directory / "certificate.pem", directory / "key.pem")
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", str(found.key), "-out", str(found.certificate),
        ],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return found

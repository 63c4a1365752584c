"""A live full to an S3 server and its restore, beside boto3's own transfer of the same bytes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Sample, compared, run
from benchmarks.vm import Place
from lab.s3_server import SeaweedFS

__all__ = ["rows"]

_BUCKET = "bench"
# boto3 at its best on a loopback: no second hash over what TCP carries, four parts of 16 MiB at once.
_BOTO3 = """
import sys
import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
url, verb, bucket, key, path = sys.argv[1:]
client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=Config(
    request_checksum_calculation="when_required", response_checksum_validation="when_required",
    s3={"payload_signing_enabled": False, "addressing_style": "path"}))
transfer = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=4)
if verb == "bucket":
    client.create_bucket(Bucket=bucket)
elif verb == "upload":
    client.upload_file(path, bucket, key, Config=transfer)
else:
    client.download_file(bucket, key, path, Config=transfer)
"""


def rows(place: Place, rounds: int) -> Iterator[str]:
    """The lines of the table."""
    program = Path(sys.executable).with_name("vmkeep")
    with SeaweedFS(place.folder) as server:
        credentials = server.credentials(place.folder / "s3.credentials")
        environment = {"AWS_SHARED_CREDENTIALS_FILE": str(credentials)}
        config = place.configuration(
            "s3",
            f'driver = "s3"\nbucket = "{_BUCKET}"\nendpoint_url = "{server.url}"\npath_style = true\n'
            f'credentials_file = "{credentials}"',
        )
        ready, fetched = place.folder / "ready.qcow2", place.folder / "fetched"
        images: list[tuple[int, str]] = []

        def boto3(verb: str, key: str = "ready", path: Path = ready) -> Sample:
            return run(sys.executable, "-c", _BOTO3, server.url, verb, _BUCKET, key, path, environment=environment)

        def ours() -> Sample:
            taken = run(program, "--config", config, "--json", "backup", "--reset", place.vm.name)
            told = json.loads(taken.output)
            images.append((told["image"], told["source"]))
            return taken

        def restored() -> Sample:
            fetched.mkdir()
            try:
                return run(program, "--config", config, "--json", "restore", str(images[0][0]), "--to", fetched)
            finally:
                shutil.rmtree(fetched)

        def downloaded() -> Sample:
            key = f"{images[0][1].replace('.', '/')}/disk.vda.qcow2"
            try:
                return boto3("download", key, fetched)
            finally:
                fetched.unlink(missing_ok=True)

        boto3("bucket")
        place.ready(ready)
        yield from compared("full to S3", {"vmkeep": ours, "boto3": lambda: boto3("upload")}, rounds)
        yield from compared("restore from S3", {"vmkeep": restored, "boto3": downloaded}, rounds)
        ready.unlink()

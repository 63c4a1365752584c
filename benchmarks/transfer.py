"""boto3's own transfer, at its best on a loopback: python -m benchmarks.transfer URL BUCKET VERB KEY FILE.

VERB is ``bucket`` (make it), ``upload`` or ``download``.
"""

from __future__ import annotations

import sys

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config


def main(url: str, bucket: str, verb: str, key: str, path: str) -> None:
    """Make the bucket, or send or fetch one file."""
    # No second hash over what TCP carries, four parts of 16 MiB at once.
    config = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": False, "addressing_style": "path"},
    )
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=config)
    transfer = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=4)
    if verb == "bucket":
        client.create_bucket(Bucket=bucket)
    elif verb == "upload":
        client.upload_file(path, bucket, key, Config=transfer)
    else:
        client.download_file(bucket, key, path, Config=transfer)


if __name__ == "__main__":
    main(*sys.argv[1:])

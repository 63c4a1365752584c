"""The S3 driver: one folder of plain objects per backup, published by its manifest."""

from backupcore_s3.driver import S3

__all__ = ["S3"]

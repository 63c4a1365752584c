"""The restic driver: one snapshot per backup, its artifacts as files at the snapshot's root."""

from backupcore_restic.driver import Restic

__all__ = ["Restic"]

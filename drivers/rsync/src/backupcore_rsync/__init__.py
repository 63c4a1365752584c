"""The rsync driver: one folder of plain files per backup, on this host, over ssh or at an rsync daemon."""

from backupcore_rsync.driver import Rsync

__all__ = ["Rsync"]

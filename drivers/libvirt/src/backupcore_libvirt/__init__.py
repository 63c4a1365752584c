"""libvirt as a hypervisor of backupcore: prebackup and postbackup, VM settings, restored definitions.

Importing the package loads nothing; the plugin is `backupcore_libvirt.plugin.Libvirt`.
"""

__version__ = "0.1.0"

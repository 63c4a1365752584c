"""The data plane: reads disks, lays out qcow2 artifacts, merges layers. Knows no hooks, no drivers, no libvirt."""

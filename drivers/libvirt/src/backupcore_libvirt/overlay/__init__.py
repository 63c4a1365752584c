"""Overlays of ours beside a VM's disks: what they say (`stack`), runs by them (`plan`, `run`), merges (`merge`)."""

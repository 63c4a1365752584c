"""Reading a held disk: what its export shows (`export`), what is taken of it (`taken`), whether it was cut (`cut`).

All that connects to an export runs in a process of its own (`process`), so `export`, `cut` and `since` know no libvirt.
"""

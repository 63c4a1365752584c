"""What tests of drivers and of host tooling stand on: a driver and a hypervisor that live in memory.

Both are ordinary plugins that keep the contract, so they also serve as its shortest examples.
"""

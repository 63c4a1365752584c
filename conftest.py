"""The fixtures for VMs serve the tests of every distribution of this repository, so they are loaded from its root."""

pytest_plugins = ["lab.fixtures", "lab.order"]

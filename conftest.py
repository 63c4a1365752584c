"""The fixtures for VMs serve the tests of every distribution of this repository, so they are loaded from its root."""

import pytest

pytest.register_assert_rewrite("tests.random_life")  # its asserts tell what they have seen, as those of a test do

pytest_plugins = ["lab.fixtures", "lab.order"]

"""Hosts for the tests that are not this machine: roots of other Debian releases, and virtual machines made of them."""

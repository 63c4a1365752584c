"""Tests that run on a host of the tests only; lab/hosts/selection.py names them."""

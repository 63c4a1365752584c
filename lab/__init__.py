"""The lab: sets up a bare machine and makes the virtual machines of the tests and the demo. Not part of any package."""

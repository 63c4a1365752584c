"""The core of a pluggable backup system for libvirt/KVM virtual machines."""

"""Drivers as they were written for version 1 of the contract. They are never changed, and go on working."""

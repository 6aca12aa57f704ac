"""Runs gateways in Ray actors or in this process, with the same results."""

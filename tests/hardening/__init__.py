"""Hostile files, inputs, waits and listeners."""

"""Layers that run with many gateways' weights at once: one file a family."""

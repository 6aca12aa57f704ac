"""Layers of many gateways at once: one file a family."""

"""Attacks on a run's own code: what they prove, and what they would have caught."""

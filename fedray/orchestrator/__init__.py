"""The driver: plan, rounds, budget, session."""

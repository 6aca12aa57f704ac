"""Settings and the user's code that they name."""

"""Settings: groups, files, names."""

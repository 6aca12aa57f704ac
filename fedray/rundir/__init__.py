"""What a run leaves behind: its directory, checkpoints, cards, manifest, and their verification."""

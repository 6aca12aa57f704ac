"""What is learned: losses, targets, metrics."""

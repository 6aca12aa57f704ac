"""What people read: terminal, pictures, HTML, trackers."""

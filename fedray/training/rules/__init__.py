"""Rules by which an operation on one record runs on many at once: one file a family."""

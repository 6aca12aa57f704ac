"""How operations on one record run on many: one file a family."""

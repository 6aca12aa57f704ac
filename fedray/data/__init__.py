"""Data sets, their partition into shards, and the checks that bad records meet before training."""

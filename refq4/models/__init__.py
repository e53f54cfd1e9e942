"""A whole model in memory: its linear layers replaced, which ones, and how good they are afterwards."""

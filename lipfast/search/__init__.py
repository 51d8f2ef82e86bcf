"""Searching for tickets: rounds of training, pruning and rewinding."""

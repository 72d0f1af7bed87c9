"""Checkpoint files to named tensors: where they are, which part a rank reads, and whether they fit."""

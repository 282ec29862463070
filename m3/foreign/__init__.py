"""Checkpoints of other libraries: how they are read, and how tables of names turn them into our tensors and back."""

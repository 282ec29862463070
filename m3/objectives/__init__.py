"""Objectives: from encoded views to a loss. One file each, named after its type in the recipe."""

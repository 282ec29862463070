"""Measures on held-out samples; one file each."""

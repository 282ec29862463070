"""Selections: from scores to a plan of what is seen and what is asked for; one file each."""

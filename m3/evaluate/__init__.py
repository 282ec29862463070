"""Is it learning? Measures on held-out samples, always beside an honest baseline."""

"""From files or the embedded world to batches of raw signals."""

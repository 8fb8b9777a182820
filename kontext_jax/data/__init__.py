"""Training data: from files of picture pairs to batches, the same on however many processes."""

"""Tasks: labelled sentences in fixed splits, and baselines without a network."""

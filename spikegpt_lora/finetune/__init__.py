"""Fine-tuning: the methods, their options, one run of one method."""

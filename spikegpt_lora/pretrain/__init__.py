"""Pre-training a language model: corpus, tokenizer, loop, and what it is measured against."""

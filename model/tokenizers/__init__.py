"""Text <-> token ids, whatever files a tokenizer comes in; tokenizer.py finds a model's own."""

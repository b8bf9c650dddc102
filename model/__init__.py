"""The LLaMA model: configuration, weights, tokenizers, templates, generation."""

"""Packed-sequence ops of LLaMA LoRA training, each with its reference."""

"""The files that weights come in and go out to, one module each way: GGUF, Meta's, torch.save's.

stored.py is what all readers return, written.py what all writers take; model/checkpoint.py chooses
among them.
"""

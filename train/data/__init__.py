"""Records become token samples, samples are drawn for an epoch, packs become tensors.

In the order of the data: tokens.py, token_cache.py (kept on disk), mixture.py (which records of
which files), batch.py (a pack as the tensors that the model takes).
"""

"""What a run trains: the model in memory, whole or sharded, and the float32 masters of its weights.

base.py reads the model and decides; masters.py is what the optimizer sees, and LoRA's; full.py and
sharding.py are the masters of all weights, on every rank or spread over them.
"""

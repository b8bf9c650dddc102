"""What a run is going to do, known before its first step.

prepare.py checks and loads a run; planner.py says which samples each step takes; memory.py foresees
the bytes of a step, hardware.py names what holds them, policy.py and room.py make do with it.
dry_run.py prints it all without reading a weight, from what outlook.py finds out.
"""

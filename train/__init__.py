"""The trainer, bottom up: each line imports only from the lines above it.

run.py                      the settings of a run
data/ report/ ranks/        token samples; metrics and scores; the processes that train together
resume/                     the run's folder, its states, and whether two runs are the same
weights/                    the model and the float32 masters of what trains
step.py                     an optimizer step
plan/                       a run before its first step: checked, loaded, planned, foreseen
evaluation.py culprits.py checkpoints.py outcome.py, then trainer.py, loop.py, main.py
"""

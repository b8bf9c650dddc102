"""What lets a run go on as if it had never stopped.

state.py writes and reads states, folder.py keeps a run's folder, fingerprint.py tells whether two
runs are the same, standing.py is what a run knows besides its weights.
"""

"""What a run tells: metrics, scores, traces, and what it was made with."""

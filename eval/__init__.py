"""Evaluation on biomedical tasks."""

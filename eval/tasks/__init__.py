"""One biomedical dataset a module."""

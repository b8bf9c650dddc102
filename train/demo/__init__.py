"""The demo recipe, its data and its model."""

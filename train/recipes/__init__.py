"""Recipes of the two papers, and our own; each says what its paper states and what is ours."""

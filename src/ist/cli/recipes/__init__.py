"""Recipes: their files, what they may hold, and the values in them."""

"""Recipes as package data: YAML files that say what to retrofit, and the embedded model that they use."""

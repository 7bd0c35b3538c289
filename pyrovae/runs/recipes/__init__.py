"""Recipes of published experiments, as TOML files."""

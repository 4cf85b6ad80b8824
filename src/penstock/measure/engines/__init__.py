"""Engines side by side: named by an arm's text, started by a recipe, measured in rounds."""

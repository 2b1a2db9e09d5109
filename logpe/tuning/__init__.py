"""Choosing tiles for a GPU, and saying what is installed: the commands ``tune`` and ``doctor``."""

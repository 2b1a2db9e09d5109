"""A language model with log positions, from text to generated text: the commands ``train`` and ``generate``."""

"""transformers model classes with three positions per token.

The files named ``*_pos2d.py`` travel inside every torch artifact and import nothing of this project.
"""

"""Text conditioning: CLIP's tokenizer and text tower, and the contrastive training of a small CLIP."""

MOST_CHUNKS = 32
"""Largest number of chunks, each of a text encoder's length, in which a text can be read."""

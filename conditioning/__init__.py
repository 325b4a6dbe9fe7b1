"""Text as the condition: CLIP's tokenizer and text tower, and the contrastive training of a small CLIP."""

MOST_CHUNKS = 32
"""Windows of a text encoder's length that a text may be read in."""

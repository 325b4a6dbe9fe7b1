"""Text conditioning: CLIP's tokenizer and text tower, and the contrastive training of a small CLIP."""

from typing import Literal

PromptWeights = Literal["none", "a1111", "comfyui"]
"""Rules for weights of words in a prompt; conditioning/weights.py."""
MOST_CHUNKS = 32
"""Largest number of chunks, each of a text encoder's length, in which a text can be read."""

"""Text as the condition: CLIP's tokenizer and text tower, and the contrastive training of a small CLIP."""

from conditioning.clip import ClipTextEncoder
from conditioning.contrastive import Contrastive, build_clip, contrastive_loss, retrieval_accuracy, save_clip
from conditioning.token_tasks import TokenTasks
from conditioning.tokenizer import load_tokenizer, save_tokenizer, tokenize, train_tokenizer

__all__ = [
    "ClipTextEncoder",
    "Contrastive",
    "TokenTasks",
    "build_clip",
    "contrastive_loss",
    "load_tokenizer",
    "retrieval_accuracy",
    "save_clip",
    "save_tokenizer",
    "tokenize",
    "train_tokenizer",
]

"""Byte-level byte-pair encoding with CLIP's conventions (Sennrich 2016; Radford et al. 2021, sec. 2.4).

Text is lower-cased and split into words; a word is a row of bytes, the last of them marked `</w>`; the most
frequent neighbours are merged, over and over. Ids run as OpenAI's: the 256 bytes, the 256 marked bytes, one
id a merge, <|startoftext|>, <|endoftext|>. The end is also the padding, as in Stable Diffusion 1: it is the
greatest id and its first occurrence is the true end, so a reader finds the end of a caption whether it looks
for the greatest id (the older rule) or for the first end (the newer).
"""

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from ldm.errors import UserError

BEGIN, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# In the order of their characters, which is OpenAI's: id 0 is "!".
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_LETTERS = [*_BYTES, *(b + WORD_END for b in _BYTES)]
SMALLEST, LARGEST = len(_LETTERS) + 2, 49408  # readers of merges.txt stop after as many merges as OpenAI's
_QUOTED = 500  # characters of what is lost; nobody reads a megabyte
_SURROGATES = re.compile("[\ud800-\udfff]")  # halves of characters, which no encoder of bytes takes


class PromptCut(UserWarning):
    """A prompt is too long, and a part of it is lost."""


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Learns at most `vocab_size` tokens; a pair of neighbours that occurs once isn't merged.

    Every byte is a token both inside and at the end of a word, so any text can be written: nothing is
    unknown. `max_length` counts tokens with begin and end. The captions' order makes no difference. Raises
    UserError when `vocab_size` isn't in 514..49408 or `max_length` is below 3.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise UserError(f"vocab_size {vocab_size}: {SMALLEST} (bytes, begin, end) to {LARGEST} are accepted")
    if max_length < 3:
        raise UserError(f"max_length {max_length}: at least 3 (begin, one token, end) is accepted")
    blank = clip_tokenizer([], max_length).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=_BYTES,
        # The trainer numbers marked letters in the order of a hash table, which changes from run to run, and
        # breaks ties by these numbers. Given as special tokens they are numbered here, and none is missing.
        special_tokens=_LETTERS[len(_BYTES) :],
        end_of_word_suffix=WORD_END,
    )
    learner.train_from_iterator(map(_whole, captions), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return clip_tokenizer(merges, max_length)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, and vocab.json and merges.txt, which older readers need."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # calls leave their settings behind, and these would be saved
    backend.no_padding()
    tokenizer.save_pretrained(str(folder))
    backend.model.save(str(folder))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer from tokenizer.json, or from vocab.json and merges.txt. No code in the folder is run.

    Whatever it was saved with, the name of a special token inside a prompt is plain text: what people write
    can't end their prompt early.
    """
    return CLIPTokenizer.from_pretrained(str(folder), split_special_tokens=True, local_files_only=True)


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str], chunks: int = 1) -> Tensor:
    """(b, chunks · max_length) int64: begin, text, end, padding, once for each chunk.

    One chunk is what a stock Stable Diffusion pipeline feeds. With more, each takes as many tokens as it holds of what
    the ones before it left, wherever words end; those that nothing is left for are the "" of other prompts.

    A prompt that is too long for all of them is cut, with a UserWarning that quotes the text that was lost, or where that
    begins. Half characters (lone surrogates) are read as U+FFFD.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts {prompts!r} is one string: a sequence of strings is accepted")
    if not prompts:
        return torch.empty(0, chunks * tokenizer.model_max_length, dtype=torch.int64)
    encoded = tokenizer(
        [_whole(p) for p in prompts],
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    size = tokenizer.model_max_length - 2
    room = chunks * size
    rows = []
    for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if len(ids) > room:
            lost = prompt[offsets[room][0] :]
            more = f" and {len(lost) - _QUOTED} characters more" if len(lost) > _QUOTED else ""
            warnings.warn(
                f'a prompt has {len(ids)} tokens and {room} fit; this part of it is lost: "{lost[:_QUOTED]}"{more}',
                PromptCut,
                stacklevel=2,
            )
        row = []
        for start in range(0, room, size):
            part = ids[start : start + size]
            padding = [tokenizer.pad_token_id] * (size - len(part))
            row += [tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *padding]
        rows.append(row)
    return torch.tensor(rows)  # (b, chunks · max_length)


def fingerprint(tokenizer: CLIPTokenizer) -> str:
    """All that decides how a text becomes ids, as JSON: the same after saving, and whatever was encoded."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": tokenizer.pad_token_id, "truncation": tokenizer.model_max_length}
    return json.dumps(state, sort_keys=True)


def clip_tokenizer(merges: list[tuple[str, str]], max_length: int) -> CLIPTokenizer:
    """The tokenizer of these merges. Two of them can make the same token, so ids are counted over distinct tokens."""
    tokens = dict.fromkeys([*_LETTERS, *(left + right for left, right in merges), BEGIN, END])
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,  # type: ignore[arg-type]  # pairs, as the backend takes them
        model_max_length=max_length,
        split_special_tokens=True,  # "<|endoftext|>" in a prompt is text
    )


def _whole(text: str) -> str:
    return _SURROGATES.sub("\ufffd", text)

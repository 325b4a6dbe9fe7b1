"""Byte-level byte-pair encoding with CLIP's conventions (Sennrich 2016; Radford et al. 2021, sec. 2.4).

Text is lower-cased and split into words. A word is a sequence of bytes, the last of them marked `</w>`. The most
frequent pair of neighbours is merged, again and again. Ids have OpenAI's order: the 256 bytes, the 256 marked bytes,
one id per merge, <|startoftext|>, <|endoftext|>. The end token is also the padding, as in Stable Diffusion 1. It is the
greatest id, and its first occurrence is the true end. So both rules for the end of a caption work: the greatest id (the
older rule) and the first end token (the newer one).
"""

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from ldm.errors import UserError
from ldm.libraries import CLIPTokenizer

BEGIN, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# Sorted by character, which is OpenAI's order: id 0 is "!".
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_LETTERS = [*_BYTES, *(b + WORD_END for b in _BYTES)]
SMALLEST, LARGEST = len(_LETTERS) + 2, 49408  # readers of merges.txt stop after OpenAI's number of merges
_SHORTEST = 3  # tokens of a prompt: start, one token, end
_QUOTED = 500  # most characters of ignored text that a warning quotes
_SURROGATES = re.compile("[\ud800-\udfff]")  # lone surrogates, which can't be encoded as bytes


class PromptCut(UserWarning):
    """Warning that a prompt is too long and its end is ignored."""


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Train a tokenizer with at most `vocab_size` tokens. A pair of neighbours that occurs only once isn't merged.

    Every byte is a token both inside a word and at its end, so any text can be encoded without unknown tokens.
    `max_length` counts tokens including begin and end. The order of the captions makes no difference. Raises UserError
    if `vocab_size` isn't in 514..49408 or `max_length` is below 3.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise UserError(f"vocab_size {vocab_size}: must be {SMALLEST} (512 bytes, start, end) to {LARGEST}")
    if max_length < _SHORTEST:
        raise UserError(f"max_length {max_length}: must be at least {_SHORTEST} (start, one token, end)")
    blank = clip_tokenizer([], max_length).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=_BYTES,
        # The trainer numbers marked bytes in the order of a hash table, which changes between runs, and breaks
        # ties by these numbers. As special tokens they get fixed numbers, and none is missing.
        special_tokens=_LETTERS[len(_BYTES) :],
        end_of_word_suffix=WORD_END,
    )
    learner.train_from_iterator(map(_whole, captions), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return clip_tokenizer(merges, max_length)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, and vocab.json and merges.txt, which older readers need."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # else the settings of earlier calls would be saved
    backend.no_padding()
    tokenizer.save_pretrained(str(folder))
    backend.model.save(str(folder))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load a CLIP tokenizer from tokenizer.json, or from vocab.json and merges.txt. No code in the folder is run.

    A special token's name inside a prompt is always plain text, whatever the saved settings, so that it can't end the
    prompt early. Raises UserError for a length that isn't possible.
    """
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), split_special_tokens=True, local_files_only=True)
    if type(length := tokenizer.model_max_length) is not int or length < _SHORTEST:
        raise UserError(
            f"tokenizer_config.json has model_max_length {length!r}: must be a whole number of at least {_SHORTEST}"
        )
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str], chunks: int = 1) -> Tensor:
    """Return ids (b, chunks · max_length) int64: each chunk has a begin token, its text, an end token and padding.

    With one chunk, the ids are the input of diffusers' Stable Diffusion pipeline. With more, the tokens fill one chunk
    after the other, and a word may be split between two. A chunk without text has the ids of the prompt "".

    A prompt that is too long for all chunks is truncated, with a PromptCut warning that quotes the ignored text or its
    beginning. Lone surrogates (half characters) are read as U+FFFD.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts {prompts!r}: must be a sequence of strings, not one string")
    return tokenize_weighted(tokenizer, [[(prompt, 1.0)] for prompt in prompts], chunks)[0]


def tokenize_weighted(
    tokenizer: CLIPTokenizer, prompts: Sequence[Sequence[tuple[str, float]]], chunks: int = 1
) -> tuple[Tensor, Tensor]:
    """Return ids as `tokenize` does, and weights (b, chunks · max_length), of prompts that consist of weighted parts.

    Each part is tokenized separately. Begin, end and padding have the weight 1.
    """
    if not prompts:
        empty = torch.empty(0, chunks * tokenizer.model_max_length)
        return empty.long(), empty
    texts = [text for parts in prompts for text, _ in parts]
    encoded = tokenizer(
        [_whole(text) for text in texts],
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    size = tokenizer.model_max_length - 2
    room = chunks * size
    rows, weights = [], []
    each = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    for parts in prompts:
        ids: list[int] = []
        own: list[float] = []
        starts: list[int] = []  # of the tokens in the prompt
        length = 0
        for text, weight in parts:
            part_ids, offsets = next(each)
            ids += part_ids
            own += [weight] * len(part_ids)
            starts += [length + start for start, _ in offsets]
            length += len(text)
        if len(ids) > room:
            rest = "".join(text for text, _ in parts)[starts[room] :]
            more = f" and {len(rest) - _QUOTED} more characters" if len(rest) > _QUOTED else ""
            warnings.warn(
                f'a prompt has {len(ids)} tokens but only {room} fit; this part is ignored: "{rest[:_QUOTED]}"{more}',
                PromptCut,
                stacklevel=3,
            )
        row: list[int] = []
        row_weights: list[float] = []
        for start in range(0, room, size):
            part = ids[start : start + size]
            missing = size - len(part)
            row += [tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * missing]
            row_weights += [1.0, *own[start : start + size], *[1.0] * (1 + missing)]
        rows.append(row)
        weights.append(row_weights)
    return torch.tensor(rows), torch.tensor(weights)  # (b, chunks · max_length) each


def fingerprint(tokenizer: CLIPTokenizer) -> str:
    """Return all that determines the ids of a text, as JSON. Saving and earlier calls don't change it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": tokenizer.pad_token_id, "truncation": tokenizer.model_max_length}
    return json.dumps(state, sort_keys=True)


def clip_tokenizer(merges: list[tuple[str, str]], max_length: int, padding: str = END) -> CLIPTokenizer:
    """Build the tokenizer of these merges. Two merges can give the same token, so ids count distinct tokens.

    padding: token that fills a text up to `max_length`.
    """
    tokens = dict.fromkeys([*_LETTERS, *(left + right for left, right in merges), BEGIN, END])
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,  # type: ignore[arg-type]  # pairs, as the backend takes them
        model_max_length=max_length,
        pad_token=padding,
        split_special_tokens=True,  # "<|endoftext|>" in a prompt is text
    )


def _whole(text: str) -> str:
    return _SURROGATES.sub("\ufffd", text)

"""Weights of words in a prompt, by the rules of two other programs.

| | `a1111` (AUTOMATIC1111, Forge) | `comfyui` |
|---|---|---|
| `(word)` | times 1.1 | times 1.1 |
| `[word]` | divided by 1.1 | plain text |
| `(word:1.3)` | times 1.3 | 1.3, whatever is around it |
| `\\(`, `\\)` | brackets as text | brackets as text |

A weight w changes a token's features z. In `a1111` they become w z, and then all features of the chunk are scaled so
that their mean is as before. In `comfyui` they become z0 + w (z − z0), with the features z0 of the empty prompt.
"""

import math
import re
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple, assert_never

from torch import Tensor

from conditioning import PromptWeights
from ldm.errors import UserError

_STEP = 1.1
_PARTS = re.compile(r"\\[()\[\]\\]?|[()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:")


class Fragment(NamedTuple):
    """Part of a prompt, and the weight of its tokens."""

    text: str
    weight: float


class _Bracket:
    """Pair of brackets. Its factor is known only at its end."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


def fragments(prompt: str, rules: PromptWeights) -> list[Fragment]:
    """Split a prompt into parts of equal weight. Raises UserError for a weight that isn't finite."""
    match rules:
        case "none":
            parts = [Fragment(prompt, 1.0)]
        case "a1111":
            parts = _a1111(prompt)
        case "comfyui":
            hidden = prompt.replace("\\)", "\0\1").replace("\\(", "\0\2")
            shown = ((f.text.replace("\0\1", ")").replace("\0\2", "("), f.weight) for f in _comfyui(hidden, 1.0))
            parts = [Fragment(text, weight) for text, weight in shown]
        case _:
            assert_never(rules)
    if wrong := next((part for part in parts if not math.isfinite(part.weight)), None):
        raise UserError(f"prompt weight {wrong.weight} of {wrong.text[:50]!r}: must be a finite number")
    return parts or [Fragment("", 1.0)]


def _a1111(prompt: str) -> list[Fragment]:
    """Brackets of both kinds nest, and their factors are multiplied. One that isn't closed lasts to the end."""
    found: list[tuple[str, list[_Bracket]]] = []
    opened: dict[str, list[_Bracket]] = {"(": [], "[": []}
    for match in _PARTS.finditer(prompt):
        part, number = match[0], match[1]
        closes = "(" if part == ")" or number is not None else "[" if part == "]" else ""
        if part in opened:
            opened[part].append(_Bracket(_STEP if part == "(" else 1 / _STEP))
        elif closes and opened[closes]:
            bracket = opened[closes].pop()
            bracket.factor = bracket.factor if number is None else float(number)
        else:
            text = part[1:] if part.startswith("\\") else part
            found.append((text, [*opened["("], *opened["["]]))
    weighted = ((text, math.prod(bracket.factor for bracket in around)) for text, around in found)
    # Neighbours of equal weight are one text, so that a colon or an escaped bracket doesn't divide a word.
    groups = groupby(weighted, key=lambda part: part[1])
    return [Fragment("".join(text for text, _ in group), weight) for weight, group in groups]


def _comfyui(text: str, weight: float) -> Iterator[Fragment]:
    for part in _outermost(text):
        if len(part) < 2 or not (part.startswith("(") and part.endswith(")")):
            yield Fragment(part, weight)
            continue
        inner, own = part[1:-1], weight * _STEP
        before, colon, number = inner.rpartition(":")
        if colon and before:
            try:
                inner, own = before, float(number)
            except ValueError:
                inner = part[1:-1]
        yield from _comfyui(inner, own)


def _outermost(text: str) -> Iterator[str]:
    """Yield the outermost pairs of brackets with what they contain, and the parts between them."""
    start = depth = 0
    for k, letter in enumerate(text):
        if letter == "(":
            if depth == 0 and k > start:
                yield text[start:k]
                start = k
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                yield text[start : k + 1]
                start = k + 1
    if start < len(text):
        yield text[start:]


def apply(rules: PromptWeights, hidden: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """Weight the features (n, tokens, width) of n chunks by their tokens' weights (n, tokens).

    empty: features of a chunk without text, (tokens, width).
    """
    w = weights.to(hidden)[..., None]
    match rules:
        case "none":
            return hidden
        case "a1111":
            weighted = hidden * w
            scale = hidden.mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True)
            return weighted * scale.where((w != 1).any(1, keepdim=True), 1)
        case "comfyui":
            return ((hidden - empty) * w + empty).where(w != 1, hidden)
        case _:
            assert_never(rules)

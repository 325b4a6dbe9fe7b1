"""Captions with two words exchanged: plausible, and wrong about the picture (Yuksekgonul et al. 2023, arXiv 2210.01936).

Contrastive training alone rewards knowing which words a caption has, hardly ever their order: two captions of the same
words are seldom in one batch. A text encoder trained so can't tell a diffusion model which object is red. Exchanged
words as additional negatives make it. An exchange is plausible if every pair of neighbours it makes occurs somewhere in
the captions, so words trade places with words of their own kind, and no list of parts of speech is needed.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise


class WordSwaps:
    """Knows which words stand beside which; `choose` gives a caption with two words exchanged."""

    def __init__(self, captions: Iterable[str]) -> None:
        self.neighbours: set[tuple[str, str]] = set()
        for caption in set(captions):
            words = ["", *caption.split(), ""]
            self.neighbours.update(pairwise(words))
        self._swaps = lru_cache(maxsize=65536)(self._find)

    def choose(self, caption: str, u: float) -> str | None:
        """One of the plausible exchanges, by u in [0, 1); None where there is none."""
        swaps = self._swaps(caption)
        return swaps[int(u * len(swaps))] if swaps else None

    def _find(self, caption: str) -> tuple[str, ...]:
        words = ["", *caption.split(), ""]
        found = []
        for i in range(1, len(words) - 1):
            for j in range(i + 1, len(words) - 1):
                if words[i] == words[j]:
                    continue
                swapped = words.copy()
                swapped[i], swapped[j] = words[j], words[i]
                made = ((swapped[k], swapped[k + 1]) for k in {i - 1, i, j - 1, j})
                if all(pair in self.neighbours for pair in made):
                    found.append(" ".join(swapped[1:-1]))
        return tuple(found)

"""Captions with a word or two changed: plausible, and wrong about the picture (Yuksekgonul et al. 2023, arXiv 2210.01936).

Contrastive training alone rewards knowing which words a caption has, hardly ever their order or their small print: two
captions that differ in one word are seldom in one batch. A text encoder trained so can't tell a diffusion model what is
above what. Slightly changed captions as additional negatives make it: one word replaced, or two exchanged. A change is
plausible if every pair of neighbours it makes occurs somewhere in the captions, so a word gives way to words of its own
kind, and no list of parts of speech is needed.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations, pairwise


class WrongCaptions:
    """Knows which words stand beside which; `choose` gives a caption that is plausibly wrong."""

    def __init__(self, captions: Iterable[str]) -> None:
        self.after: dict[str, set[str]] = defaultdict(set)
        for caption in set(captions):
            for first, second in pairwise(["", *caption.split(), ""]):
                self.after[first].add(second)
        self._changes = lru_cache(maxsize=65536)(self._find)

    def choose(self, caption: str, u: float) -> str | None:
        """One of the plausible changes, by u in [0, 1): first which words, all alike, then how. None if there is none."""
        places = self._changes(caption)
        if not places:
            return None
        place, rest = divmod(u * len(places), 1)
        changes = places[int(place)]
        return changes[int(rest * len(changes))]

    def _find(self, caption: str) -> tuple[tuple[str, ...], ...]:
        """For each word that can be replaced, and for each two that can be exchanged, the captions this gives."""
        words = ["", *caption.split(), ""]
        inside = range(1, len(words) - 1)
        places = []
        for i in inside:
            others = sorted(w for w in self.after[words[i - 1]] - {words[i], ""} if words[i + 1] in self.after[w])
            places.append(tuple(self._with(words, {i: other}) for other in others))
        for i, j in combinations(inside, 2):
            swapped = {i: words[j], j: words[i]}
            changed = [swapped.get(k, word) for k, word in enumerate(words)]
            made = ((changed[k], changed[k + 1]) for k in (i - 1, i, j - 1, j))
            if words[i] != words[j] and all(second in self.after[first] for first, second in made):
                places.append((self._with(words, swapped),))
        return tuple(changes for changes in places if changes)

    @staticmethod
    def _with(words: list[str], changed: dict[int, str]) -> str:
        return " ".join(changed.get(k, word) for k, word in enumerate(words)).strip()

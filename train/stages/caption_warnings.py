"""Captions that are too long for the text encoder: quoted once a run, then counted."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from conditioning.tokenizer import PromptCut


class CutCaptions:
    """Counts the captions that are cut, which may be thousands, and says the first."""

    def __init__(self, say: Callable[[str], object], more: str) -> None:
        """more: the option that makes room for longer ones."""
        self.say, self.more, self.count = say, more, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the captions that are cut inside."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptCut)
            yield
        for warning in caught:
            if not issubclass(warning.category, PromptCut):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
                continue
            self.count += 1
            if self.count == 1:
                self.say(f"caption too long: {warning.message!s:.250} ({self.more} makes room; others aren't told)")

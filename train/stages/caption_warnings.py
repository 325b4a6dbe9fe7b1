"""Warnings about captions that are too long for the text encoder: the first is quoted, the rest are counted."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from conditioning.tokenizer import PromptCut


class CutCaptions:
    """Counter of truncated captions, which may be thousands; only the first is printed."""

    def __init__(self, say: Callable[[str], object], more: str) -> None:
        """more: the option that allows longer captions."""
        self.say, self.more, self.count = say, more, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the captions that are truncated inside."""
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

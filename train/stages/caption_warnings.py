"""Warnings about captions that are too long for the text encoder: the first is printed, all are counted."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from conditioning.tokenizer import PromptCut


class TruncatedCaptions:
    """Counter of truncated captions. There may be thousands, so only the first is printed."""

    def __init__(self, report: Callable[[str], object], option: str) -> None:
        """report: prints a line. option: the command-line option that allows longer captions."""
        self.report, self.option, self.count = report, option, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the captions that are truncated within the context. Other warnings are passed on."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptCut)
            yield
        for warning in caught:
            if not issubclass(warning.category, PromptCut):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
                continue
            self.count += 1
            if self.count == 1:
                self.report(
                    f"caption too long: {warning.message!s:.250} (a larger {self.option} allows longer captions; "
                    "this warning is printed once)"
                )

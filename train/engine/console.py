"""Console output of a run."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from ldm.errors import printable

Item = TypeVar("Item")


class Console:
    """Printer of lines, above the progress bar if there is one. Only the main process prints."""

    def __init__(self, main: bool = True) -> None:
        self.main = main

    def __call__(self, text: str) -> None:
        if self.main:
            tqdm.write(printable(text))
            sys.stdout.flush()

    def progress(self, items: Iterable[Item], total: int, doing: str) -> Iterable[Item]:
        """Return the items with a progress bar, which disappears when all are read. doing: what is done with them."""
        return tqdm(
            items, desc=doing, total=total, unit="batch", leave=False, disable=not self.main, dynamic_ncols=True
        )

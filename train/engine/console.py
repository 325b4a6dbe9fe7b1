"""Lines for the person who watches a run."""

import sys

from tqdm import tqdm


class Console:
    """Writes lines, above a progress bar where there is one; the main process alone does."""

    def __init__(self, main: bool = True) -> None:
        self.main = main

    def __call__(self, text: str) -> None:
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

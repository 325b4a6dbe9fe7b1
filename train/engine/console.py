"""Console output of a run."""

import sys

from tqdm import tqdm


class Console:
    """Printer of lines, above the progress bar if there is one. Only the main process prints."""

    def __init__(self, main: bool = True) -> None:
        self.main = main

    def __call__(self, text: str) -> None:
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

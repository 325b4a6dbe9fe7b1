"""The warnings of the commands that a job runs, so that the page shows them beside the result.

Commands warn in three ways: with `train.output.warn`, with Python's warnings and through a logger. The latter two are
passed on to the first.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from conditioning.tokenizer import PromptCut
from ldm.model import warn_once
from train.output import listening, warn

_LOGGERS = ("ldm", "autoencoder", "conditioning", "train")


class _Handler(logging.Handler):
    """Pass logged warnings on to `warn`. Failures are printed as without it."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            warn(record.getMessage())
        elif logging.lastResort:
            logging.lastResort.handle(record)


@contextmanager
def noticing(listener: Callable[[str], None]) -> Iterator[None]:
    """Call a function with each warning while a job runs, also with those that an earlier job gave too."""
    handler, shown = _Handler(logging.WARNING), warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, PromptCut):
            warn(str(message))
        else:
            shown(message, category, *place, **more)

    warn_once.cache_clear()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    with listening(listener), warnings.catch_warnings():
        warnings.simplefilter("always", PromptCut)
        warnings.showwarning = show
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)

"""Errors of the page: one plain line in a box, never a traceback, and never markup."""

import html
import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import gradio as gr
from pydantic import ValidationError

from ldm.errors import RunError, UserError, one_line
from train.config.load import first_error

P = ParamSpec("P")
R = TypeVar("R")


def plain(handler: Callable[P, R]) -> Callable[P, R]:
    """Make a handler of an event show each of its errors as one plain line."""

    @wraps(handler)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except ValidationError as error:
            raise shown(first_error(error)) from None
        except (UserError, RunError, OSError) as error:
            raise shown(error) from None
        except Exception as error:
            logging.getLogger(__name__).exception("%s failed", handler.__name__)
            raise shown(f"failed unexpectedly ({type(error).__name__}): {error}") from None

    return run


def shown(message: object) -> gr.Error:
    """Return an error that the page shows as one line of plain text; the page would run the markup in it."""
    return gr.Error(html.escape(one_line(message, 500)), print_exception=False)

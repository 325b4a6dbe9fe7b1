"""The shared part of all commands: turn exceptions into one line and an exit status, and select the device."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, NoReturn

from pydantic import ValidationError

from ldm.errors import RunError, UserError, one_line
from train.config.load import first_error

if TYPE_CHECKING:
    import torch

_LESS = "lower --batch-size; in training --accumulation splits it, in painting --tile and a smaller image help"
_EXPECTED = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
)


def command(main: Callable[[], None]) -> Callable[[], NoReturn]:
    """Make a function the main of a program: it exits, with a status and one line on standard error after a failure.

    Exit status: 0 on success, 2 for bad input, 1 for a failure, 128 + n when stopped by signal n.
    """

    @wraps(main)
    def run() -> NoReturn:
        _run(main)

    return run


def _run(main: Callable[[], None]) -> NoReturn:
    warnings.filterwarnings("ignore", module="huggingface_hub")  # about calls from other libraries
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"
    _quieten()
    try:
        main()
    except UserError as error:
        _leave(2, error)
    except ValidationError as error:
        _leave(2, first_error(error))
    except RunError as error:
        _leave(1, error)
    except MemoryError:
        _leave(1, f"out of memory: {_LESS}")
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's class; torch isn't imported just for its name
            _leave(1, f"out of memory on the device: {_LESS}")
        if "can't allocate memory" not in str(error):
            raise
        _leave(1, f"out of memory: {_LESS}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python fails once more when it flushes at exit
        _leave(1, "the output was closed before all of it was written")
    except OSError as error:
        if error.errno not in _EXPECTED:
            raise
        _leave(1, f"{error.strerror}: {error.filename}" if error.filename else f"{error.strerror} while writing")
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    raise SystemExit(0)


def _quieten() -> None:
    """Turn off the messages of libraries: failures are reported by our errors; transformers lists unused weights.

    Environment variables apply to libraries that aren't imported yet: a command imports them after reading its options.
    """
    os.environ |= {
        "DIFFUSERS_VERBOSITY": "critical", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"
    }  # fmt: skip
    if diffusers := sys.modules.get("diffusers"):
        diffusers.logging.set_verbosity(logging.CRITICAL)
    if transformers := sys.modules.get("transformers"):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


def _leave(status: int, what: object) -> NoReturn:
    if os.environ.get("RANK", "0") == "0" or status == 1:
        print(f"error: {one_line(what)}", file=sys.stderr)
    raise SystemExit(status)


def use_device(name: str) -> "torch.device":
    """Return the named device; without a name, the GPU if there is one. Raises UserError if it can't be used."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name!r} can't be used: {one_line(error, 200)}") from None
    return device

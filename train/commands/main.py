"""The shared part of all commands: imports, errors as one line with an exit status, and the choice of the device."""

import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pydantic import ValidationError

from ldm.errors import RunError, UserError, one_line
from ldm.imports import without_garbage_collection
from train.config.load import first_error
from train.output import make_printable

if TYPE_CHECKING:
    import torch

    from autoencoder.tiling import Tiles

_SMALLEST_TILE = 4  # latents; smaller ones have no overlap, and there are too many of them
_SAVE_MEMORY = (
    "lower --batch-size; in training, a larger --accumulation also helps; in generation, --tile or smaller images"
)


def command(main: Callable[[], None]) -> Callable[[], NoReturn]:
    """Make a function the main function of a program: exit with a status, and print one line for an error.

    Exit status: 0 on success, 2 for bad input, 1 for a failure, 128 + n when stopped by signal n.
    """

    @wraps(main)
    def run() -> NoReturn:
        _run(main)

    return run


def _run(main: Callable[[], None]) -> NoReturn:
    make_printable()
    if find_spec("fcntl") is None:  # locks of files
        _exit(2, "runs on Linux and macOS only; on Windows, install WSL, which runs Linux: wsl --install")
    warnings.filterwarnings("ignore", module="huggingface_hub")  # its warnings are about calls by other libraries
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"
    if logging.lastResort is not None:  # logged warnings look like the others
        logging.addLevelName(logging.WARNING, "warning")
        logging.addLevelName(logging.ERROR, "error")
        logging.lastResort.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    _quieten()
    signal.signal(signal.SIGINT, _interrupt)
    try:
        main()
    except UserError as error:
        _exit(2, error)
    except ValidationError as error:
        _exit(2, first_error(error))
    except RunError as error:
        _exit(1, error)
    except MemoryError:
        _exit(1, f"out of memory: {_SAVE_MEMORY}")
    except RuntimeError as error:
        # torch's class is compared by name, because torch may not be imported.
        if type(error).__name__ == "OutOfMemoryError":
            _exit(1, f"out of memory on the device: {_SAVE_MEMORY}")
        if "can't allocate memory" not in str(error):
            raise
        _exit(1, f"out of memory: {_SAVE_MEMORY}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python fails again when it flushes at exit
        _exit(1, "the output was closed before all of it was written")
    except OSError as error:
        _exit(1, f"{error.strerror}: {error.filename}" if error.filename and error.strerror else error)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what remains takes seconds at most
        _exit(130, "interrupted")
    raise SystemExit(0)


@contextmanager
def imports() -> Iterator[None]:
    """Import a command's modules faster, and leave their objects out of later garbage collection if possible."""
    with without_garbage_collection():
        yield
    if "triton" not in sys.modules:  # it reports in 28 lines, at exit, that frozen objects were leaked
        gc.freeze()


def _interrupt(number: int, frame: object) -> NoReturn:
    """Handle a first Control-C by ending with a clean-up, and a second one by ending at once."""

    def end(*_: object) -> NoReturn:
        os.write(2, b"error: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    raise KeyboardInterrupt


def _quieten() -> None:
    """Turn off the messages of libraries, because our errors report the failures.

    The environment variables apply to libraries that aren't imported yet; a command imports them after it has read its
    options.
    """
    os.environ |= {
        "DIFFUSERS_VERBOSITY": "critical",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if diffusers := sys.modules.get("diffusers"):
        diffusers.logging.set_verbosity(logging.CRITICAL)
    if transformers := sys.modules.get("transformers"):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


def _exit(status: int, message: object) -> NoReturn:
    if os.environ.get("RANK", "0") == "0" or status == 1:
        print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(status)


def require_at_least(least: int, options: object, *names: str) -> None:
    """Raise UserError if one of these options, given by the names of their fields, is below `least`."""
    for name in names:
        if (value := getattr(options, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def require_folder(out: str) -> None:
    """Raise UserError if --out can't be a folder, because it or a folder above it is a file."""
    folder = Path(out)
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise UserError(f"--out {out!r}: can't be a folder, because {str(file)!r} is a file; choose another")


def tiles(side: int | None) -> "Tiles | None":
    """Return the tiles of --tile. Raises UserError for tiles so small that they'd take hours."""
    from autoencoder.tiling import Tiles

    if side is not None and side < _SMALLEST_TILE:
        raise UserError(f"--tile {side}: must be at least {_SMALLEST_TILE} latents, e.g. 64")
    return None if side is None else Tiles(side, side // 4)


def best_device() -> str:
    """Return the device to run on: a GPU (cuda), else Apple's (mps), else the CPU.

    Training runs on the device that accelerate chooses, in the same order.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def use_device(name: str) -> "torch.device":
    """Return the named device; without a name, the best one (see `best_device`).

    Raises UserError if it can't be used.
    """
    import torch

    try:
        device = torch.device(name or best_device())
    except RuntimeError:
        raise UserError(f"--device {name!r}: must be a device of torch, e.g. cpu, cuda or cuda:1") from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name!r}: can't be used: {one_line(error, 200)}") from None
    return device

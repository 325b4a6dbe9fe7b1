"""Serve the web page."""

import socket
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ldm.errors import UserError
from train.commands.main import imports
from train.config.page import PageOptions
from train.output import warn
from train.page.isolation import isolate

_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(o: PageOptions, started: Callable[[str], None] = print) -> None:
    """Serve the page until it is interrupted. started: called with the address once it answers."""
    auth = check(o)
    host = "0.0.0.0" if o.listen and o.host in _LOCAL else o.host
    _require_free(host, o.port)
    isolate(Path(o.out))
    with imports():  # gradio is an extra
        from train.page.app import build
        from train.page.places import Places
        from train.page.server import Address, start
        from train.page.shared import Page

    page = Page(Places(Path(o.models), Path(o.runs), Path(o.data), Path(o.out)), device=o.device)
    blocks = build(page)
    for line in opened(o):
        warn(line)
    try:
        started(start(blocks, page, Address(host, o.port, auth, o.share)))
        while True:
            time.sleep(3600)
    finally:
        page.jobs.close()
        blocks.close(verbose=False)


def check(o: PageOptions) -> tuple[str, str] | None:
    """Return the name and password. Raises UserError for options that don't fit together."""
    if find_spec("gradio") is None:
        raise UserError("the page needs the package gradio: run pip install gradio")
    for name in ("models", "runs", "data"):
        if Path(getattr(o, name)).is_file():
            raise UserError(f"--{name} {getattr(o, name)!r}: is a file; give a folder")
    if not 0 < o.port < 65536:
        raise UserError(f"--port {o.port}: must be 1 to 65535")
    if o.host not in _LOCAL and not o.listen:
        raise UserError(f"--host {o.host!r}: other machines could use the page; add --listen if that is wanted")
    name, colon, password = o.auth.partition(":")
    if o.auth and not (name and colon and password):
        raise UserError("--auth: must be NAME:PASSWORD")
    if o.share and not o.auth:
        raise UserError("--share: the whole internet could use the page; add --auth NAME:PASSWORD")
    return (name, password) if o.auth else None


def opened(o: PageOptions) -> list[str]:
    """Return a line on each option that lets others use the page."""
    lines = []
    if o.listen:
        without = "" if o.auth else " without a password; add --auth NAME:PASSWORD"
        lines.append(f"--listen: everybody in the network can use the page{without}")
    if o.share:
        lines.append("--share: the internet can reach the page, through gradio's company, which sees all that is sent")
    return lines


def _require_free(host: str, port: int) -> None:
    """Raise UserError if the address can't be used, e.g. because another program does."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: can't be used: {error.strerror}; choose another") from None

"""The server of the page: loopback by default, no request to anywhere else, limits on what is sent to it."""

import io
import logging
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
import safehttpx
from gradio import processing_utils
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm.errors import RunError, UserError
from train.page.shared import Page
from train.page.uploads import LARGEST_UPLOAD

_LARGEST_REQUEST = 2**26
_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval' 'wasm-unsafe-eval'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""Policy of browsers: the page may load only files of this server. gradio itself needs inline scripts."""
_ENDPOINTS = re.compile(
    r"/((assets|static)/.*|config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|login/?|logout|gradio_api/("
    r"queue/(join|data)|(call|run|api|heartbeat)/.*|upload|upload_progress|file[=/].*|component_server/?|"
    r"startup-events|cancel|reset/?|info/?|openapi\.json|app_id/?|login_check/?|user/?|token/?|theme\.css))?",
    re.DOTALL,
)
"""The endpoints of gradio that the page needs. Others edit code, convert recordings or fetch addresses."""
_STYLE = """
#start-image img { width: 100%; height: 100%; object-fit: contain }
.job progress { width: 100%; accent-color: var(--color-accent) }
.job .failed { color: var(--error-text-color) }
.job .warned { color: var(--body-text-color); border-left: 3px solid #d97706; padding-left: .6rem; margin: .3rem 0 }
"""
"""Small images are enlarged. Errors and warnings of jobs are marked."""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


@dataclass(frozen=True)
class Address:
    """Address of the page, and who can reach it."""

    host: str
    port: int
    auth: tuple[str, str] | None = None
    share: bool = False

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in ("127.0.0.1", "localhost", "::1") and not self.share


class Guard:
    """Refuse what no visitor of the page needs: foreign hosts and origins, huge requests, files elsewhere."""

    def __init__(self, app: ASGIApp, local: bool, tunnel: bool, folders: Sequence[Path]) -> None:
        """Guard an app.

        local: accept only requests to localhost. tunnel: the host's name may change on the way. folders: those whose
        files are served.
        """
        self.app, self.local, self.tunnel = app, local, tunnel
        self.folders = [folder.resolve() for folder in folders]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope["path"], headers):
            await _answer(send, *refusal)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= _LARGEST_REQUEST else {"type": "http.disconnect"}

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, limited, with_policy)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return the status and line with which a request is refused; None: it is accepted."""
        host = headers.get("host", "")
        if self.local and _name(host) not in ("127.0.0.1", "localhost", "[::1]"):
            return 403, "this page answers only requests to localhost"
        origin = headers.get("origin", "")
        if origin and origin.partition("://")[2] != host and not self.tunnel:
            return 403, "requests from other web pages aren't accepted"
        if not headers.get("content-length", "0").isdigit() or int(headers.get("content-length", 0)) > _LARGEST_REQUEST:
            return 413, f"a request can have up to {_LARGEST_REQUEST // 2**20} MB"
        if not _ENDPOINTS.fullmatch(path):
            return 404, "the page has nothing here"
        if file := re.search(r"/file[=/](.*)", path, re.DOTALL):
            return None if self._is_served(file[1]) else (403, "this file isn't served")
        return None

    def _is_served(self, file: str) -> bool:
        """Return whether a file is in one of the folders, also after all links are followed."""
        try:
            path = Path(file).resolve()
        except (OSError, RuntimeError, ValueError):
            return False
        return any(path.is_relative_to(folder) for folder in self.folders)


def _name(host: str) -> str:
    """Return a host's name without the port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host


async def _answer(send: Send, status: int, line: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": line.encode()})


def start(blocks: gr.Blocks, page: Page, address: Address) -> str:
    """Serve the page in another thread, and return its address.

    Raises OSError if the port can't be used, and RunError if there is no tunnel although one is wanted.
    """
    for library in ("httpx", "uvicorn"):
        logging.getLogger(library).setLevel(logging.ERROR)
    images, animations, cache = (page.places.inside("out", name) for name in ("images", "animations", "cache"))
    for folder in (images, animations, cache):
        folder.mkdir(parents=True, exist_ok=True)
    _forbid_downloads()
    guard = Middleware(Guard, local=address.is_local, tunnel=address.share, folders=[images, animations, cache])
    with redirect_stdout(io.StringIO()):  # gradio's own lines on the tunnel
        _, local, shared = blocks.launch(
            server_name=address.host,
            server_port=address.port,
            auth=address.auth,
            share=address.share,
            theme=THEME,
            css=_STYLE,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            max_file_size=LARGEST_UPLOAD,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            inbrowser=False,
            allowed_paths=[str(images.resolve()), str(animations.resolve())],
            app_kwargs={"middleware": [guard]},
        )
    if address.share and not shared:
        raise RunError("--share: gradio's servers gave no tunnel; check the network, or leave --share out")
    return shared or local


def _forbid_downloads() -> None:
    """Keep gradio from fetching an address that a visitor gives instead of a file."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UserError("addresses aren't fetched; upload the file")

    for name in ("get", "async_validate_url"):
        setattr(safehttpx, name, refuse)
    for name in ("ssrf_protected_download", "async_ssrf_protected_download"):
        setattr(processing_utils, name, refuse)

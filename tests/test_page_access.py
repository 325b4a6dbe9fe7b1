"""Who can use the page: the password, --listen, --share, and the lines on what each option opens."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio import networking

from ldm.errors import RunError, UserError
from support.page import Served, serving
from train.commands.page import check, opened, serve
from train.config.page import PageOptions
from train.page.server import Address, Guard

NAME, PASSWORD = "name", "wörd:2"


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page with a password, with an image in the gallery."""
    with serving(tmp_path_factory.mktemp("page"), (NAME, PASSWORD)) as served:
        (served.page.places.out / "images/x.png").write_bytes(b"secret")
        yield served


def requests(served: Served, browser: httpx.Client) -> list[int]:
    """Send a request of each kind; return the status of each answer."""
    file = served.page.places.out / "images/x.png"
    return [
        browser.get(f"{served.url}/config").status_code,
        browser.get(f"{served.url}/gradio_api/file={file}").status_code,
        browser.get(f"{served.url}/gradio_api/info").status_code,
        browser.post(f"{served.url}/gradio_api/upload", files={"files": ("a.png", b"x")}).status_code,
        browser.post(f"{served.url}/gradio_api/call/cancel", json={"data": []}).status_code,
    ]


def login(served: Served, browser: httpx.Client, name: str, password: str) -> int:
    return browser.post(f"{served.url}/login", data={"username": name, "password": password}).status_code


def test_without_a_password_there_is_only_the_login(closed: Served) -> None:
    with httpx.Client() as browser:
        assert requests(closed, browser) == [401] * 5
        front = browser.get(closed.url)
        assert "auth_required" in front.text
        assert "generate-text" not in front.text


@pytest.mark.parametrize(
    ("name", "password"),
    [(NAME, "other"), (NAME, ""), ("", PASSWORD), ("other", PASSWORD), (PASSWORD, NAME), (NAME, f"{PASSWORD} x")],
)
def test_a_wrong_password_opens_nothing(closed: Served, name: str, password: str) -> None:
    with httpx.Client() as browser:
        assert login(closed, browser, name, password) in (400, 422)
        assert not browser.cookies
        assert requests(closed, browser) == [401] * 5


def test_the_password_opens_the_page_for_one_browser_until_it_leaves(closed: Served) -> None:
    with httpx.Client() as browser, httpx.Client() as other:
        assert login(closed, browser, NAME, PASSWORD) == 200
        assert requests(closed, browser) == [200] * 5
        assert requests(closed, other) == [401] * 5
        kept = dict(browser.cookies)
        assert browser.get(f"{closed.url}/logout", follow_redirects=True).status_code == 200
        assert requests(closed, httpx.Client(cookies=kept)) == [401] * 5


def test_forged_cookies_open_nothing(closed: Served) -> None:
    with httpx.Client() as browser:
        login(closed, browser, NAME, PASSWORD)
        names = list(browser.cookies)
    for value in ("", "x", NAME, "None", "null"):
        assert requests(closed, httpx.Client(cookies=dict.fromkeys(names, value))) == [401] * 5


def test_the_cookie_is_hidden_from_scripts(closed: Served) -> None:
    answer = httpx.post(f"{closed.url}/login", data={"username": NAME, "password": PASSWORD})
    cookies = answer.headers.get_list("set-cookie")
    assert len(cookies) == 2
    assert all("httponly" in cookie.lower() for cookie in cookies)


# -- --listen and --share ----------------------------------------------------------------------------------------------


def test_options_that_open_the_page_need_a_word_more() -> None:
    for options, said in (
        ({"host": "0.0.0.0"}, "--listen"),
        ({"share": True}, "--auth"),
        ({"auth": "name"}, "NAME:PASSWORD"),
        ({"port": 0}, "--port"),
        ({"models": __file__}, "--models"),
    ):
        with pytest.raises(UserError, match=said):
            check(PageOptions(**options))
    assert check(PageOptions(auth="a:b:c", share=True)) == ("a", "b:c")


def test_each_option_that_opens_the_page_has_a_line() -> None:
    assert opened(PageOptions()) == []
    assert opened(PageOptions(auth="a:b")) == []
    (line,) = opened(PageOptions(listen=True))
    assert line == "--listen: everybody in the network can use the page without a password; add --auth NAME:PASSWORD"
    listen, share = opened(PageOptions(listen=True, share=True, auth="a:b"))
    assert listen == "--listen: everybody in the network can use the page"
    assert "the internet can reach the page" in share


def test_without_gradio_a_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.commands.page.find_spec", lambda name: None)
    with pytest.raises(UserError, match="run pip install gradio"):
        check(PageOptions())


def test_a_port_in_use_is_one_line(closed: Served) -> None:
    port = int(closed.url.rpartition(":")[2])
    with pytest.raises(UserError, match="choose another"):
        serve(PageOptions(port=port))


def status(guard: Guard, host: str, origin: str = "") -> int:
    """Send a request to a guard; return the status of the answer, 200 if it was let through."""
    answers: list[Any] = []

    async def send(message: Any) -> None:
        answers.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    headers = [(b"host", host.encode()), *([(b"origin", origin.encode())] if origin else [])]
    asyncio.run(guard({"type": "http", "path": "/config", "headers": headers}, receive, send))  # type: ignore[arg-type]
    return int(answers[0]["status"])


async def _passed(_: Any, __: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200})


@pytest.mark.parametrize(
    ("address", "foreign_host", "foreign_origin"),
    [
        (Address("127.0.0.1", 1), 403, 403),
        (Address("0.0.0.0", 1), 200, 403),
        (Address("127.0.0.1", 1, ("a", "b"), share=True), 200, 200),
    ],
    ids=["loopback", "listen", "share"],
)
def test_hosts_and_origins_that_are_accepted(address: Address, foreign_host: int, foreign_origin: int) -> None:
    guard = Guard(_passed, local=address.is_local, tunnel=address.share, folders=[])
    assert status(guard, "127.0.0.1:1") == 200
    assert status(guard, "192.168.0.7:1") == foreign_host
    assert status(guard, "192.168.0.7:1", "http://192.168.0.7:1") == foreign_host
    assert status(guard, "127.0.0.1:1", "http://evil.example") == foreign_origin


def test_a_tunnel_that_can_not_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise RuntimeError("Could not get share link from Gradio API Server.")

    monkeypatch.setattr(networking, "setup_tunnel", fail)
    with (
        pytest.raises(RunError, match="--share: gradio's servers gave no tunnel"),
        serving(tmp_path, ("a", "b"), share=True),
    ):
        pass
    assert capsys.readouterr().out == ""


def test_the_address_of_the_tunnel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networking, "setup_tunnel", lambda *_, **__: "https://abc.gradio.live")
    with serving(tmp_path, ("a", "b"), share=True) as served:
        assert served.url == "https://abc.gradio.live"

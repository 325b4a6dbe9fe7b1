"""The web page over plain HTTP: its jobs, and hundreds of hostile names, uploads and requests, none of which works.

One server with small models serves all tests of this file.
"""

import io
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.formats.png import png_bytes, read_png
from support.commands import run_script
from support.page import Served, serving
from train.config.generation import Txt2ImgOptions
from train.page.grid import Axis, draw_grid
from train.page.jobs import Job, Jobs
from train.page.painting import drawn_mask
from train.page.uploads import Canvas
from train.page.view import describe

SECRET = "canary-5d1f"
LOCAL = ("127.0.0.1", "::1", "localhost", None, "")
FORM = {
    **{"model": "small", "prompt": "a small red star", "negative_prompt": "", "steps": 3, "guidance_scale": 3.0},
    **{"sampler": "dpmpp_2m", "seed": 7, "num_images": 1, "width": 0, "height": 0, "spacing": "own"},
    **{"eta": 0.0, "guidance_rescale": 0.0, "prompt_weights": "none", "precision": "fp32"},
}
UNUSED = (None, 0.8, None, 1, 1.0, 0, 0, 0, 0, 0)
"""Fields of the tabs for editing, in a grid of text to image."""
SETTINGS = {"negative_prompt": "", "steps": 3, "sampler": "ddim", "guidance_scale": 2.0, "seed": 7, "prompt": "x"}


@pytest.fixture(scope="module")
def asked() -> Iterator[list[str]]:
    """The addresses outside of this machine that this process has tried to reach."""
    found: list[str] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def connecting(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            found.append(str(address))
        connect(self, address)

    def looking(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in LOCAL:
            found.append(str(host))
        return lookup(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connecting)
        patch.setattr(socket, "getaddrinfo", looking)
        yield found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, asked: list[str]) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("page")
    (root / "secret").mkdir()
    (root / "secret" / "secret.txt").write_text(SECRET)
    Image.new("RGB", (16, 16)).save(root / "secret" / "secret.png")
    with serving(root) as served:
        places = served.page.places
        for folder in (places.models, places.runs, places.data, places.out, places.out / "images"):
            (folder / "leak").symlink_to(root / "secret")
            (folder / "leak.png").symlink_to(root / "secret" / "secret.txt")
        inside = places.models / "linked"
        inside.mkdir()
        (inside / "model_index.json").write_text("{}")
        (inside / "unet").symlink_to(root / "secret")
        yield served


class Answer(NamedTuple):
    """Result of a call: its data, or its error."""

    data: list[Any] | None
    error: str


def call(served: Served, name: str, *data: Any) -> Answer:
    """Call a named function of the page as any program can."""
    url = f"{served.url}/gradio_api/call/{name}"
    started = httpx.post(url, content=json.dumps({"data": data}), headers={"content-type": "application/json"})
    if started.status_code != 200:
        return Answer(None, started.text)
    events = httpx.get(f"{url}/{started.json()['event_id']}", timeout=60).text
    kind, content = re.findall(r"event: (\w+)\ndata: (.*)", events)[-1]
    return Answer(json.loads(content), "") if kind == "complete" else Answer(None, content)


def text_to_image(served: Served, **change: Any) -> Answer:
    return call(served, "text_to_image", *(FORM | change).values())


def upload(served: Served, name: str, content: bytes) -> dict[str, Any]:
    """Upload a file, and return its record as a value of a field."""
    answer = httpx.post(f"{served.url}/gradio_api/upload", files={"files": (name, content)}, timeout=60)
    assert answer.status_code == 200, answer.text
    return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def finished(served: Served, seconds: float = 60) -> Job:
    """Wait for the newest job, and return it."""
    job = served.page.jobs.all()[0]
    assert served.page.jobs.wait(job, seconds)
    return job


def png(image: Image.Image | None = None) -> bytes:
    file = io.BytesIO()
    (image or Image.effect_noise((32, 32), 80).convert("RGB")).save(file, "PNG")
    return file.getvalue()


# -- what works --------------------------------------------------------------------------------------------------------


def test_the_page_generates_what_the_command_generates(served: Served, tmp_path: Path) -> None:
    """The same file, byte for byte."""
    answer = text_to_image(served, num_images=2)
    assert answer.data is not None, answer
    job = finished(served)
    assert (job.state, job.progress, len(job.result)) == ("done", 1.0, 2)
    model = served.page.places.models / "small"
    options = ("--prompt", FORM["prompt"], "--steps", 3, "--seed", 7, "--num-images", 2, "--device", "cpu")
    by_command = run_script("txt2img", "--model", model, *options, "--out", tmp_path).paths
    for name, path in zip(job.result, by_command, strict=True):
        assert (served.page.places.out / name).read_bytes() == path.read_bytes()


def test_image_to_image_and_inpainting_keep_what_was_uploaded(served: Served) -> None:
    noise = Image.effect_noise((32, 32), 80).convert("RGB")
    record = upload(served, "a.png", png(noise))
    assert call(served, "image_to_image", record, 0.5, *FORM.values()).data is not None
    (name,) = finished(served).result
    kept = read_png(served.page.places.out / name)["image"][0]
    assert (np.asarray(Image.open(kept)) == np.asarray(noise)).all()
    layer = Image.new("RGBA", (32, 32))
    layer.paste((255, 0, 255, 255), (4, 4, 12, 12))
    drawing = {"background": record, "layers": [upload(served, "layer.png", png(layer))], "composite": None, "id": None}
    assert call(served, "inpaint", drawing, 1.0, 0, 0, 0, 0, 4, *FORM.values()).data is not None
    (name,) = finished(served).result
    made, given = np.asarray(Image.open(served.page.places.out / name)), np.asarray(noise)
    assert made.shape == (36, 32, 3)
    same = (made[:32] == given).all(-1)
    assert same[12:].all()
    assert same[:, 12:].all()
    assert not same[4:12, 4:12].all()


def test_a_cancelled_job_ends_within_a_step_and_a_waiting_one_never_starts(served: Served) -> None:
    text_to_image(served, steps=1000)
    first = served.page.jobs.all()[0]
    text_to_image(served)
    second = served.page.jobs.all()[0]
    while first.progress == 0:
        time.sleep(0.01)
    assert first.preview is not None
    assert call(served, "cancel_waiting").error == ""
    assert call(served, "cancel").error == ""
    assert finished(served).state == "cancelled"
    assert served.page.jobs.wait(first, 10)
    assert (first.state, first.result, second.result) == ("cancelled", [], None)
    assert first.progress < 0.5


def test_a_dropped_png_fills_the_form(served: Served) -> None:
    text_to_image(served, prompt="a blue square", steps=4, seed=3)
    (name,) = finished(served).result
    record = upload(served, "x.png", (served.page.places.out / name).read_bytes())
    filled = call(served, "drop", record).data
    assert filled is not None
    assert filled[:7] == ["small", "a blue square", "", 4, 3.0, "dpmpp_2m", 3]


def test_a_grid_has_an_image_for_each_pair_of_values(served: Served) -> None:
    axes = ("Steps", "1-3 (+2)", "Prompt: search and replace", "red, blue")
    answer = call(served, "grid", "text", *axes, *UNUSED, *FORM.values())
    assert answer.data is not None, answer
    *cells, sheet = finished(served).result
    saved = [read_png(served.page.places.out / name) for name in cells]
    prompts = [f"a small {colour} star" for colour in ("red", "blue")]
    assert [(one["steps"], one["prompt"]) for one in saved] == [(n, prompt) for prompt in prompts for n in (1, 3)]
    assert read_png(served.page.places.out / sheet)["grid"]["Steps"] == ["1", "3"]


def test_a_grid_of_edited_images(served: Served) -> None:
    """Each image is that of the tab with the same settings; what isn't masked stays."""
    noise = Image.effect_noise((32, 32), 80).convert("RGB")
    record, layer = upload(served, "a.png", png(noise)), Image.new("RGBA", (32, 32))
    layer.paste((255, 0, 255, 255), (4, 4, 12, 12))
    drawing = {"background": record, "layers": [upload(served, "layer.png", png(layer))], "composite": None, "id": None}
    fields = (record, 0.8, drawing, *UNUSED[3:], *FORM.values())
    out = served.page.places.out

    answer = call(served, "grid", "image", "Strength", "0.4, 0.8", "Steps", "2, 3", *fields)
    assert answer.data is not None, answer
    *cells, sheet = finished(served).result
    saved = [read_png(out / name) for name in cells]
    assert [(one["strength"], one["steps"]) for one in saved] == [(0.4, 2), (0.8, 2), (0.4, 3), (0.8, 3)]
    assert read_png(out / sheet)["grid"] == {"Strength": ["0.4", "0.8"], "Steps": ["2", "3"]}
    call(served, "image_to_image", record, 0.4, *FORM.values())
    (single,) = finished(served).result
    assert (out / single).read_bytes() == (out / cells[2]).read_bytes()

    assert call(served, "grid", "inpaint", "Seed", "1, 2", "none", "", *fields).data is not None
    *cells, _ = finished(served).result
    first, second = (np.asarray(Image.open(out / name)) for name in cells)
    kept = np.ones((32, 32), bool)
    kept[4:12, 4:12] = False
    assert (first[kept] == np.asarray(noise)[kept]).all()
    assert (first[~kept] != second[~kept]).any()

    refused(call(served, "grid", "image", "Width", "32", "none", "", *fields))
    refused(call(served, "grid", "text", "Strength", "0.5", "none", "", *fields))
    refused(call(served, "grid", "image", "Strength", "0.5, 2", "none", "", *fields))


def test_values_of_an_axis(served: Served) -> None:
    o = Txt2ImgOptions(prompt="a red star")

    def labels(name: str, text: str) -> list[str]:
        return [label for label, _ in Axis.read(name, text, served.page.places, o).values]

    assert labels("Steps", "1, 4-6, 10-20 [3]") == ["1", "4", "5", "6", "10", "15", "20"]
    assert labels("Guidance", "1-2 (+0.5), 3-1 (-1)") == ["1", "1.5", "2", "3", "2", "1"]
    assert labels("Prompt", 'a star, "red, or blue"') == ["a star", "red, or blue"]
    change = dict(Axis.read("Guidance", "2.5", served.page.places, o).values)["2.5"]
    assert change(o).guidance_scale == 2.5


def test_the_grid_is_drawn_with_each_image_unchanged() -> None:
    images = [[Image.new("RGB", (20, 30), (50 * r, 60 * c, 9)) for c in range(3)] for r in range(2)]
    sheet = draw_grid(images, ["one", "two", "a long label that needs several lines"], ["r", "s"])
    colours = {colour for _, colour in sheet.getcolors(10_000)}
    assert colours >= {(50 * r, 60 * c, 9) for r in range(2) for c in range(3)}


def test_a_drawn_mask_is_white_where_any_layer_has_paint() -> None:
    layers = [Image.new("RGBA", (8, 8)) for _ in range(2)]
    assert drawn_mask(layers, (8, 8)) is None
    layers[0].paste((1, 2, 3, 255), (0, 0, 2, 2))
    layers[1].paste((0, 0, 0, 255), (6, 6, 8, 8))
    mask = drawn_mask(layers, (4, 4))
    assert mask is not None
    assert (np.asarray(mask) == np.diag([255, 0, 0, 255])).all()


def test_the_html_names_no_address_to_load(served: Served) -> None:
    answer = httpx.get(served.url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", answer.text)
    assert [url for url in loaded if "//" in url and not url.startswith(served.url)] == []
    css = [httpx.get(f"{served.url}/{path.lstrip('./')}").text for path in loaded if path.endswith(".css")]
    assert css
    assert not re.search(
        r"url\(['\"]?https?:|@import", "".join(css) + json.dumps(httpx.get(f"{served.url}/config").json()["theme_hash"])
    )


def test_a_failing_job_gives_one_line_and_the_next_one_runs() -> None:
    jobs = Jobs()

    def fail(_: Job) -> None:
        raise ZeroDivisionError("x\ny")

    bad, good = jobs.submit("paint", "bad", fail), jobs.submit("paint", "good", lambda job: 3)
    assert jobs.wait(good, 10)
    assert (bad.state, bad.text) == ("failed", "failed unexpectedly (ZeroDivisionError): x y")
    assert (good.state, good.result) == ("done", 3)
    jobs.close()


# -- what doesn't ------------------------------------------------------------------------------------------------------

NAMES = [
    *(
        "",
        ".",
        "..",
        "../secret",
        "small/../../secret",
        "/etc/passwd",
        "//etc/passwd",
        "~/x",
        "~root",
        "a/../../secret",
    ),
    *("leak", "leak/secret.txt", "linked", "small/unet/../../..", "..\\secret", "\\etc", "C:\\x", "small\0", "\0"),
    *("pipe:touch canary", "PIPE:touch canary", "openai/clip-vit-base-patch32", "stabilityai/sd", "hf://a/b"),
    *("http://127.0.0.1:1/x", "file:///etc/passwd", "s3://bucket/x", "%2e%2e/secret", "x" * 5000, "a\nb", "\ud800"),
]


def refused(answer: Answer) -> None:
    """Check that a call failed with one plain line, which doesn't quote any file."""
    assert answer.data is None, answer
    assert SECRET not in answer.error
    assert "Traceback" not in answer.error
    assert "\\n" not in answer.error.replace("\\\\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:30]))
def test_a_hostile_name_of_a_model_is_refused(served: Served, name: str) -> None:
    refused(text_to_image(served, model=name))
    refused(call(served, "grid", "text", "Model", json.dumps(name), "none", "", *UNUSED, *FORM.values()))


@pytest.mark.parametrize("place", ["models", "runs", "data", "out"])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:30]))
def test_a_hostile_name_leads_nowhere(served: Served, place: Any, name: str) -> None:
    folder = served.page.places.folder(place).resolve()
    with suppress(UserError):  # "." leads to the folder itself
        assert served.page.places.existing(place, name).resolve().is_relative_to(folder)


@pytest.mark.parametrize("value", [None, 3, True, ["small"], {"path": "/etc/passwd"}, b"small"])
def test_a_name_that_is_no_text_is_refused(served: Served, value: Any) -> None:
    with pytest.raises(UserError):
        served.page.places.inside("data", value)


def hostile_files(served: Served) -> list[str]:
    out, root = served.page.places.out, served.root
    return [
        *("/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/proc/self/environ", "/dev/zero"),
        *(f"{root}/secret/secret.txt", f"{out}/images/leak.png", f"{out}/images/leak/secret.txt", f"{out}/leak.png"),
        *(f"{out}/images/../../secret/secret.txt", f"{out}/cache/../../secret/secret.txt", "secret/secret.txt"),
        *(
            f"{served.page.places.models}/small/model_index.json",
            f"{out}/uploads",
            "http://127.0.0.1:1/",
            "file:///etc",
        ),
        *("https://example.org/", "\\\\host\\share", f"{out}/images/", "pyproject.toml", f"{out}/images/%00"),
    ]


@pytest.mark.slow
def test_no_file_outside_is_served(served: Served) -> None:
    for file in hostile_files(served):
        for form in ("gradio_api/file=", "gradio_api/file/", "file=", "gradio_api/proxy="):
            answer = httpx.get(f"{served.url}/{form}{file}")
            assert answer.status_code >= 400, (form, file)
            assert SECRET not in answer.text
            assert "root:" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        *("gradio_api/proxy=http://127.0.0.1:1/", "gradio_api/vibe-edit", "gradio_api/vibe-code", "monitoring", "docs"),
        *(
            "gradio_api/process_recording",
            "gradio_api/run-history/records",
            "gradio_api/profiling/clear",
            "openapi.json",
        ),
        *("gradio_api/custom_component/1/client/component/x.js", "gradio_api/dev/reload", "gradio_api/deep_link"),
        *("../etc/passwd", "%2e%2e/etc/passwd", "svelte/..%2f..%2f..%2fetc/passwd", "pwa_icon/1", "gradio_api/runs"),
    ],
)
def test_endpoints_that_the_page_does_not_need_are_closed(served: Served, path: str) -> None:
    assert httpx.get(f"{served.url}/{path}").status_code == 404
    assert httpx.post(f"{served.url}/{path}", content=b"{}").status_code == 404


@pytest.mark.parametrize("path", ["assets/../../../../etc/passwd", "static/..%2f..%2f..%2f..%2fetc%2fpasswd"])
def test_no_asset_leads_elsewhere(served: Served, path: str) -> None:
    answer = httpx.get(f"{served.url}/{path}")
    assert answer.status_code >= 400
    assert "root:" not in answer.text


def test_a_drawing_is_kept_within_limits(served: Served) -> None:
    """The endpoint that receives what was drawn."""
    editor = next(c for c in httpx.get(f"{served.url}/config").json()["components"] if c["type"] == "imageeditor")

    def send(index: str, content: bytes, id: str = "x") -> int:
        data = {"type": "layer", "index": index, "id": id, "fn_name": "accept_blobs", "session_hash": "s"}
        form = {"component_id": str(editor["id"])} | data
        files = {"file": ("blob", content)}
        return httpx.post(f"{served.url}/gradio_api/component_server", data=form, files=files, timeout=60).status_code

    assert send("0", b"x") == 200
    for index in ("1000000000", "-1", "x"):
        assert send(index, b"x") >= 400
    for k in range(40):
        send("0", b"x", str(k))
    (canvas,) = (block for block in served.blocks.blocks.values() if isinstance(block, Canvas))
    assert len(canvas.blob_storage) <= 16


def test_a_generated_image_is_served(served: Served) -> None:
    text_to_image(served)
    (name,) = finished(served).result
    path = served.page.places.out.resolve() / name
    assert httpx.get(f"{served.url}/gradio_api/file={path}").content == path.read_bytes()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IDAT", rows), chunk(b"IEND", b"")])


def hostile_uploads() -> dict[str, bytes]:
    whole = png()
    bomb = zlib.compress(b"\0" * 2**27)
    return {
        "a.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "b.html": b"<script>alert(1)</script>",
        "c.png": b"<svg/>",
        "d.png": whole[: len(whole) // 2],
        "e.png": whole[:20],
        "f.png": b"",
        "g.png": png_of(60_000, 60_000, rows=bomb),
        "h.png": png_of(2**31 - 1, 1, rows=b"x"),
        "i.png": png_of(0, 0),
        "j.png": png_of(8, 8, chunk(b"zTXt", b"ldm\0\0" + bomb), rows=zlib.compress(b"\0" * 200)),
        "k.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "l.pdf": b"%PDF-1.4\n",
        "m.png": b"GIF89a" + b"\xff" * 40,
        "n.png": b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
        "o.bmp": b"BM" + b"\xff" * 60,
        "p.tiff": b"II*\0" + b"\xff" * 60,
        "q.fli": b"\x12\xaf" * 100,
        "../../r.png": b"x",
        "/etc/s.png": b"x",
        "t.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\xff" * 30,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile_uploads())
def test_a_hostile_upload_is_refused_in_each_field(served: Served, name: str) -> None:
    content = hostile_uploads()[name]
    answer = httpx.post(f"{served.url}/gradio_api/upload", files={"files": (name, content)}, timeout=60)
    if answer.status_code != 200:
        return
    path = Path(answer.json()[0])
    assert path.resolve().is_relative_to(served.page.places.out.resolve() / "cache")
    record = {"path": str(path), "orig_name": name, "meta": {"_type": "gradio.FileData"}}
    if name != "j.png":  # an image with metadata that aren't read here
        refused(call(served, "image_to_image", record, 0.5, *FORM.values()))
    drawing = {"background": record, "layers": [record], "composite": record, "id": None}
    refused(call(served, "inpaint", drawing, 1.0, 0, 0, 0, 0, 0, *FORM.values()))
    refused(call(served, "drop", record))


def test_a_file_of_100_mb_is_refused(served: Served) -> None:
    for size in (2**25 + 1, 100 * 2**20):
        answer = httpx.post(f"{served.url}/gradio_api/upload", files={"files": ("x.png", bytes(size))}, timeout=60)
        assert answer.status_code == 413
    large = sum(path.stat().st_size for path in served.page.places.out.rglob("*") if path.is_file())
    assert large < 2**26


def records(served: Served) -> list[Any]:
    meta = {"meta": {"_type": "gradio.FileData"}}
    secret, out = served.root / "secret" / "secret.png", served.page.places.out
    return [
        *({"path": str(path), **meta} for path in (secret, "/etc/passwd", out / "images" / "leak.png", "/dev/zero")),
        *({"path": url, "url": url, **meta} for url in ("http://127.0.0.1:1/x.png", "https://example.org/x.png")),
        {"path": str(secret), "url": "data:image/png;base64,AAAA", **meta},
        {"path": f"{out}/cache/../../secret/secret.png", **meta},
        {"path": str(served.page.places.models / "small" / "model_index.json"), **meta},
    ]


@pytest.mark.slow
def test_a_file_that_was_not_uploaded_is_refused(served: Served) -> None:
    for record in records(served):
        refused(call(served, "image_to_image", record, 0.5, *FORM.values()))
        refused(call(served, "drop", record))
        drawing = {"background": record, "layers": [], "composite": None, "id": None}
        refused(call(served, "inpaint", drawing, 1.0, 0, 8, 0, 0, 0, *FORM.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        *({"out": "/tmp"}, {"device": "cuda"}, {"prompts": "/etc/passwd"}, {"like": "x"}, {"steps": "many"}),
        *({"weak_model": "/etc", "weak_scale": 3.0}, {"compose": [["x", "y"]]}, {"steps": 1e400}, {"seed": -5.5}),
        *({"image": "/etc/passwd"}, {"extend": 3}, {"way": {}}, {"grid": [1], "x": {}}, {"sha256": [1]}),
    ],
    ids=str,
)
def test_hostile_settings_in_a_png_are_refused_or_have_no_effect(served: Served, change: dict[str, Any]) -> None:
    content = png_bytes(Image.new("RGB", (8, 8)), SETTINGS | {"model": "x"})
    text = json.dumps(SETTINGS | {"model": "/etc"} | change)
    info = PngInfo()
    info.add_itxt("ldm", text)
    file = io.BytesIO()
    Image.open(io.BytesIO(content)).save(file, "PNG", pnginfo=info)
    answer = call(served, "drop", upload(served, "x.png", file.getvalue()))
    assert SECRET not in json.dumps(answer)
    if answer.data is not None:
        assert "weak_model" in change  # known to the command, but not a field of the form


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        *({"steps": n} for n in (-1, 10**9, "x", None, [1], {"a": 1}, 1e999)),
        *({"num_images": n} for n in (0, -1, 10**6, "x")),
        *({"width": n} for n in (-8, 10**6, 33.5, "x")),
        *({"seed": n} for n in (-2, 2**70, "x")),
        *({"sampler": n} for n in ("x", "", 3, ["ddim"], "__import__('os')")),
        *({"spacing": "x"}, {"eta": "x"}, {"precision": "fp64"}, {"prompt_weights": "x"}, {"guidance_scale": "nan!"}),
        *({"prompt": "x" * 5_000_000},),
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_hostile_value_is_refused_or_fails_with_a_line(served: Served, change: dict[str, Any]) -> None:
    answer = text_to_image(served, **change)
    if answer.data is None:
        refused(answer)
        return
    job = finished(served)
    assert job.state == "failed" or next(iter(change.values())) in (None, "", 0), job


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt", ["<script>alert(1)</script>", "\0", "\ud800", "${7*7}", "{{7*7}}", "../../x", "%n%s"]
)
def test_a_hostile_prompt_is_only_text(served: Served, prompt: str) -> None:
    answer = text_to_image(served, prompt=prompt)
    if answer.data is not None:
        job = finished(served)
        assert job.state == "done"
        assert "<script" not in describe(served.page)
        path = served.page.places.out / job.result[0]
        assert path.parent == served.page.places.out / "images"
        assert read_png(path)["prompt"] == prompt


@pytest.mark.slow
@pytest.mark.parametrize("values", ["1-999999999", "1-9 (+0)", "1-9 [0]", "", ",,,", "1-9 [99999999]", "x", "0", "1e9"])
def test_a_hostile_axis_is_refused(served: Served, values: str) -> None:
    refused(call(served, "grid", "text", "Steps", values, "none", "", *UNUSED, *FORM.values()))
    refused(call(served, "grid", "text", values, "1", "none", "", *UNUSED, *FORM.values()))
    refused(call(served, "grid", values, "Steps", "1", "none", "", *UNUSED, *FORM.values()))


@pytest.mark.parametrize(
    "headers",
    [
        *({"Host": host} for host in ("evil.example", "127.0.0.1.evil.example", "192.168.0.1:80", "")),
        *({"Origin": origin} for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "https://localhost")),
    ],
    ids=str,
)
def test_requests_from_other_pages_are_refused(served: Served, headers: dict[str, str]) -> None:
    for path in ("", "config", "gradio_api/info", "gradio_api/file=x"):
        assert httpx.get(f"{served.url}/{path}", headers=headers).status_code in (400, 403)
    assert httpx.post(f"{served.url}/gradio_api/call/cancel", json={"data": []}, headers=headers).status_code in (
        400,
        403,
    )


def test_nothing_outside_was_reached_or_written_and_the_page_still_works(served: Served, asked: list[str]) -> None:
    """The last test, after all attacks."""
    assert asked == []
    assert sorted(path.name for path in served.root.iterdir()) == ["data", "models", "out", "runs", "secret"]
    assert (served.root / "secret" / "secret.txt").read_text() == SECRET
    assert sorted(path.name for path in (served.root / "secret").iterdir()) == ["secret.png", "secret.txt"]
    written = {path.name for path in served.page.places.out.iterdir()}
    assert written <= {"images", "animations", "uploads", "cache", "leak", "leak.png"}
    assert text_to_image(served).data is not None
    assert finished(served).state == "done"

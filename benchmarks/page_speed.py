"""Measure the page: the time from its start to the first image, and the time of a job beside that of the command.

    python benchmarks/page_speed.py runs/demo/model

The page is started as a user starts it, and asked over HTTP. Then page and command generate the same images in this
process, in turn, each with the model already loaded; the page also makes previews. Under a minute on two cores.
"""

import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from ldm.errors import UserError
from train.commands.generate import Session, load
from train.commands.main import command
from train.commands.txt2img import txt2img
from train.config.generation import Txt2ImgOptions
from train.page.jobs import Jobs
from train.page.painting import generate, options, submit
from train.page.places import Places
from train.page.shared import Page

ROUNDS = 5


def first_image(model: Path, out: Path) -> tuple[float, float, float]:
    """Start the page, and ask for an image.

    Returns the seconds until it answers and until the image's file is there, and its CPU seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = ("--models", model.parent, "--runs", out, "--data", out, "--out", out / "page")
    words = (sys.executable, "scripts/page.py", *folders, "--port", port)
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
    try:
        form = [model.name, "a small red star", "", 25, 3.0, "own", 0, 1, 0, 0, "own", 0.0, 0.0, "none", "fp32"]
        answered = 0.0
        while time.perf_counter() - started < 120:
            try:
                httpx.post(
                    f"http://127.0.0.1:{port}/gradio_api/call/text_to_image", json={"data": form}
                ).raise_for_status()
                answered = time.perf_counter() - started
                break
            except httpx.TransportError:
                time.sleep(0.05)
        while time.perf_counter() - started < 120:
            if any((out / "page" / "images").glob("*.png")):
                seconds = time.perf_counter() - started
                process.terminate()
                process.wait()
                used = resource.getrusage(resource.RUSAGE_CHILDREN)
                return answered, seconds, used.ru_utime + used.ru_stime
            time.sleep(0.02)
        raise UserError("no image within two minutes")
    finally:
        process.terminate()
        process.wait()


def speeds(model: Path, out: Path, images: int) -> dict[str, float]:
    """Return the median seconds in which the command and a job of the page generate images, which alternate."""
    page = Page(Places(model.parent, out, out, out / "page"), Jobs())
    values: dict[str, Any] = {"model": model.name, "prompt": "a small red star", "seed": 0, "num_images": images}
    o = options(Txt2ImgOptions, page, values)
    pipe, times = load(o, o.model), {"command": [], "page": []}  # type: ignore[var-annotated]
    for k in range(ROUNDS + 1):
        started = time.perf_counter()
        list(txt2img(o, Session(lambda *_: pipe)))
        between = time.perf_counter()
        page.jobs.wait(submit(page, "speed", lambda job: generate(o, job, page)), 300)
        if k:  # not the first round, which loads the page's model
            times["command"].append(between - started)
            times["page"].append(time.perf_counter() - between)
    page.jobs.close()
    return {name: statistics.median(seconds) for name, seconds in times.items()}


@command
def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "model_index.json").is_file():
        raise UserError("give the folder of a model, e.g. runs/demo/model")
    model = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        answered, seconds, used = first_image(model, Path(folder))
        print(f"the page answers after {answered:.1f} s; first image after {seconds:.1f} s and {used:.1f} s of CPU")
        for images in (1, 32):
            times = speeds(model, Path(folder), images)
            ratio = times["page"] / times["command"]
            print(f"{images} images: command {times['command']:.2f} s, page {times['page']:.2f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()

"""The tab with which people compare two models without seeing which is which."""

from typing import Any, get_args

import gradio as gr
from PIL import Image

from ldm.errors import UserError, printable
from ldm.samplers import SamplerKind
from train.config.sampling import SamplingOptions
from train.page import markup
from train.page.comparing import KIND, MOST_PAIRS, OWN, submit
from train.page.datasets import dataset_names, enlarged
from train.page.errors import plain
from train.page.places import Places
from train.page.shared import Page
from train.page.studies import Poll, find_studies

_SECONDS = 1.0
_SIDE = 448  # pixels; smaller images are shown with larger pixels
_KEYS = """() => {
  if (window.ldmVotes) return;
  window.ldmVotes = true;
  const buttons = {"1": "vote-left", "2": "vote-right", "0": "vote-tie", "=": "vote-tie"};
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, textarea, select, [contenteditable]")) return;
    const button = document.getElementById(buttons[event.key]);
    if (button && button.offsetParent !== null && !button.disabled) button.click();
  });
}"""


def tab(page: Page) -> None:
    """Add the tab to the page."""
    places = page.places
    with gr.Row():
        study = gr.Dropdown([], label="Comparison", elem_id="study", scale=3)
        voter = gr.Textbox(label="Your name (may be empty)", elem_id="voter", max_length=60, scale=2)
    status = gr.HTML(elem_id="compare-status")
    number = gr.State(None)
    prompt = gr.Textbox(label="Which image is better?", elem_id="compare-prompt", interactive=False, lines=1)
    with gr.Row():
        left, right = (
            gr.Image(label=key, elem_id=f"image-{key}", format="png", interactive=False, height=480, buttons=[])
            for key in ("1", "2")
        )
    with gr.Row():
        votes = {
            "left": gr.Button("1: the left one", elem_id="vote-left", interactive=False),
            "tie": gr.Button("0 or =: neither", elem_id="vote-tie", interactive=False),
            "right": gr.Button("2: the right one", elem_id="vote-right", interactive=False),
        }
    with gr.Accordion("Result", open=False, elem_id="compare-result"):
        show = gr.Button("Show the result so far", elem_id="show-result")
        result = gr.HTML(elem_id="result")
    pair = [number, prompt, left, right, *votes.values()]
    quiet: Any = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
    acted = quiet | {"queue": True}  # only queued events show their errors
    _new_comparison(page, status, quiet, acted)

    def names() -> Any:
        found = find_studies(places.runs / "compare")
        return gr.Dropdown(choices=found, value=next(iter(found), None))

    def look(chosen: str | None) -> tuple[str, Any]:
        found = find_studies(places.runs / "compare")
        choice = gr.Dropdown(choices=found, value=chosen if chosen in found else next(iter(found), None))
        return _status(page), choice

    gr.on(None, plain(names), None, study, **quiet)  # when the page is opened
    gr.Timer(_SECONDS).tick(plain(look), study, [status, study], **quiet)
    gr.on([study.change, voter.change], plain(lambda s, v: _pair(places, s, v)), [study, voter], pair, **quiet)
    study.change(lambda: "", None, result, **quiet)
    for choice, button in votes.items():
        button.click(plain(_voting(places, choice)), [study, voter, number], pair, **acted)
    show.click(plain(lambda s: _result(places, s)), study, result, **acted)
    context = gr.context.Context.root_block
    if context is not None:
        context.load(None, None, None, js=_KEYS)


def _new_comparison(page: Page, status: gr.HTML, quiet: dict[str, Any], acted: dict[str, Any]) -> None:
    """Add the form of a new comparison."""
    with gr.Accordion("New comparison", open=False, elem_id="new-comparison"):
        with gr.Row():
            name = gr.Textbox(label="Name", elem_id="compare-name", max_length=100)
            found = page.places.model_names()
            models = [
                gr.Dropdown(found, value=next(iter(found[k:]), None), label=label, elem_id=f"model-{k + 1}")
                for k, label in enumerate(("First model", "Second model"))
            ]
        with gr.Row():
            prompts = gr.Textbox(label="Prompts, one a line", lines=4, elem_id="compare-prompts", scale=2)
            sets = dataset_names(page.places)
            dataset = gr.Dropdown(
                [("none", ""), *((name, name) for name in sets)],
                value=next(iter(sets), ""),
                label="or held-out captions of the dataset",
                elem_id="compare-dataset",
            )
        with gr.Row():
            pairs = gr.Number(
                50, label=f"Pairs, up to {MOST_PAIRS}", precision=0, elem_id="compare-pairs", min_width=90
            )
            steps = gr.Number(25, label="Steps (other samplers)", precision=0, elem_id="compare-steps", min_width=90)
            scale = gr.Number(SamplingOptions.guidance_scale, label="Guidance", min_width=90)
            sampler = gr.Dropdown(
                [("each model's own, with its steps", OWN), *((name, name) for name in get_args(SamplerKind))],
                value=OWN,
                label="Sampler",
                elem_id="compare-sampler",
            )
            seed = gr.Number(0, label="Seed", precision=0, min_width=90)
        with gr.Row():
            start = gr.Button("Generate the images", variant="primary", elem_id="compare-start")
            cancel = gr.Button("Cancel", elem_id="compare-cancel")

    def choices() -> list[Any]:
        found, sets = page.places.model_names(), dataset_names(page.places)
        both = gr.Dropdown(choices=found)
        return [both, both, gr.Dropdown(choices=[("none", ""), *((name, name) for name in sets)])]

    def started(name: str, first: str, second: str, *values: Any) -> str:
        fields = ("prompts", "dataset", "pairs", "steps", "guidance_scale", "sampler", "seed")
        submit(page, name, (first, second), dict(zip(fields, values, strict=True)))
        return _status(page)

    def cancelled() -> str:
        for job in page.jobs.all(KIND):
            if not job.finished:
                page.jobs.cancel(job.id)
        return _status(page)

    gr.on(None, plain(choices), None, [*models, dataset], **quiet)  # when the page is opened
    given = [name, *models, prompts, dataset, pairs, steps, scale, sampler, seed]
    start.click(plain(started), given, status, **acted)
    cancel.click(plain(cancelled), None, status, **acted)


def _voting(places: Places, choice: str) -> Any:
    def vote(study: str | None, voter: str, number: int | None) -> list[Any]:
        if study and number is not None:
            _poll(places, study).vote(voter, number, choice)
        return _pair(places, study, voter)

    return vote


def _poll(places: Places, study: object) -> Poll:
    if not study or "/" in str(study) or str(study).startswith("."):
        raise UserError(f"comparison {str(study)!r:.100}: choose one")
    return Poll.open(places.existing("runs", f"compare/{study}"))


def _pair(places: Places, study: str | None, voter: str) -> list[Any]:
    """Return the voter's next pair: number, prompt, both images, and the buttons."""
    pair = _poll(places, study).next_pair(voter) if study else None
    buttons = [gr.Button(interactive=pair is not None)] * 3
    if pair is None:
        label = "All pairs are done: thank you" if study else "Which image is better?"
        return [None, gr.Textbox("", label=label), None, None, *buttons]
    label = f"Which image is better? Pair {pair.done + 1:,} of {pair.total:,}"
    images = [enlarged(Image.fromarray(pixels), _SIDE) for pixels in (pair.left, pair.right)]
    return [pair.number, gr.Textbox(printable(pair.prompt), label=label), *images, *buttons]


def _result(places: Places, study: str | None) -> str:
    """Return the result as a table: who was preferred, and how sure that is."""
    poll = _poll(places, study)
    counts, n = poll.result(), poll.result().votes
    low, high = counts.interval
    rows = [
        (poll.study.first, f"votes: {counts.first:,}"),
        (poll.study.second, f"votes: {counts.second:,}"),
        ("ties", f"{counts.ties:,}"),
        (
            f"share of {poll.study.second}, ties counted half",
            f"{counts.share:.1%}, 95 % interval {low:.1%} to {high:.1%} (Wilson)" if n else "no votes yet",
        ),
        ("if both were equally good", f"a result like this has probability {counts.p_value:.3g} (sign test, no ties)"),
        ("voters", f"{len({vote['voter'] for vote in poll.votes()}):,}"),
    ]
    return markup.styled(markup.facts(rows))


def _status(page: Page) -> str:
    job = next(iter(page.jobs.all(KIND)), None)
    if job is None or job.state == "done":
        none = markup.quiet("no comparisons yet: make one below")
        return "" if find_studies(page.places.runs / "compare") else markup.styled(none)
    text = f"{job.state}: {job.text}" if job.text else job.state
    return markup.styled(markup.status(job.title, text, job.progress, failed=job.state == "failed"))

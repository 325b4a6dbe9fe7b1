"""The form that starts or continues a run: one widget for each setting of the stage, with its help."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.errors import UserError, one_line
from train.config.run import RunConfig
from train.page import trainings
from train.page.errors import plain
from train.page.forms import Field, config_of, group_help, values_of
from train.page.forms import form as fields_of
from train.page.offers import TITLES, offers, starting_config, starting_points
from train.page.places import Places
from train.page.runs import find_runs
from train.page.shared import Page

_NEEDED = ("data", "teacher", "vae", "text_encoder")
_ESSENTIAL = (
    "data",
    "teacher",
    "vae",
    "text_encoder",
    "init",
    "steps",
    "batch_size",
    "optimizer.lr",
    "input.resolution",
)


def form(page: Page, run: gr.Dropdown) -> None:
    """Add the form. run: the list of runs, in which a started run is chosen."""
    places = page.places
    quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
    with gr.Accordion("Start or continue a run", open=False, elem_id="run-form"):
        with gr.Row():
            stage = gr.Radio([(title, name) for name, title in TITLES.items()], value="ldm", label="Stage")
            point = gr.Dropdown([], label="Begin with the settings of", elem_id="run-point", scale=2)

        @gr.render(inputs=[stage, point])
        def _show(stage: str, point: str | None) -> None:
            if point:
                _form(places, stage, point, run, quiet)

    def points(stage: str) -> Any:
        found = starting_points(places, stage)
        usual = f"shipped:pictures/{stage}"
        return gr.Dropdown(choices=found, value=usual if usual in dict(found).values() else found[0][1])

    gr.on(None, plain(lambda: points("ldm")), None, point, **quiet)
    stage.change(plain(points), stage, point, **quiet)


def _form(places: Places, stage: str, point: str, run: gr.Dropdown, quiet: dict[str, Any]) -> None:
    try:
        config = starting_config(places, stage, point)
    except UserError as error:
        gr.Textbox(one_line(error, 500), label="These settings can't be used", interactive=False)
        return
    continued = point.startswith("run:")
    values, offered = values_of(config), offers(places, stage)
    for field in _NEEDED:
        if not (continued or values.get(field) or values.get("init")) and offered.get(field):
            values[field] = offered[field][0]
    name = point.partition(":")[2] if continued else ""
    out = gr.Textbox(
        name,
        interactive=True,
        label="Name of the run",
        elem_id="run-name",
        info=f"Folder in {places.runs}." + " The same name continues the run, another one starts anew." * continued,
        max_length=200,
    )
    widgets = dict(_widgets(stage, values, offered))
    with gr.Row():
        changes = gr.Checkbox(
            False,
            interactive=True,
            label="Accept changed settings",
            info="Continue a run with other settings where that is possible, as --resume-with-changes does.",
            visible=continued,
        )
        start = gr.Button("Start or continue" if continued else "Start", variant="primary", elem_id="run-start")
    message = gr.Textbox(label="Result", elem_id="run-result", interactive=False, lines=1)

    def started(out: str, changes: bool, *given: Any) -> tuple[Any, str]:
        try:
            config = checked(places, stage, out, dict(zip(widgets, given, strict=True)))
            trainings.start(config, places, with_changes=changes)
        except UserError as error:
            return gr.skip(), f"not started: {one_line(error, 500)}"
        name = str(Path(config.out).relative_to(places.runs))
        return gr.Dropdown(choices=find_runs(places.runs), value=name), f"{name} is starting; the status is above"

    start.click(plain(started), [out, changes, *widgets.values()], [run, message], **quiet)


def checked(places: Places, stage: str, name: str, values: dict[str, Any]) -> RunConfig:
    """Return the configuration of a form. name: the run's, in --runs. Raises UserError for the first wrong setting."""
    if not name:
        raise UserError("the name of the run is missing: choose one, e.g. mine/ldm")
    out = places.inside("runs", name)
    config = config_of(stage, values | {"out": str(out)})
    trainings.require_inside(config, places)
    return config


def _widgets(stage: str, values: dict[str, Any], offered: dict[str, list[str]]) -> Iterator[tuple[str, Any]]:
    """Yield the widget of each setting, the most important ones first and the others in groups."""
    fields = [field for field in fields_of(stage) if field.name != "out"]
    first = [field for name in _ESSENTIAL for field in fields if field.name == name]
    rest = [field for field in fields if field not in first]
    yield from _rows(first, values, offered)
    for group, members in groupby(rest, lambda field: field.group):
        help = group_help(stage, group) if group else "Steps, checkpoints, precision and more."
        with gr.Accordion(group.replace(".", ": ") or "run", open=False):
            gr.Markdown(help)
            yield from _rows(list(members), values, offered)


def _rows(fields: list[Field], values: dict[str, Any], offered: dict[str, list[str]]) -> Iterator[tuple[str, Any]]:
    with gr.Row(equal_height=True):
        for field in fields:
            yield field.name, _widget(field, values[field.name], offered.get(field.name, []))


def _widget(field: Field, value: Any, offered: list[str]) -> Any:
    common: dict[str, Any] = {
        "label": field.name,
        "info": field.help,
        "elem_id": f"field-{field.name.replace('.', '-')}",
        "min_width": 300,
        "interactive": True,
    }
    match field.kind:
        case "switch":
            return gr.Checkbox(value, **common)
        case "integer":
            return gr.Number(value, precision=0, **common)
        case "choice":
            return gr.Dropdown(list(field.choices), value=value, **common)
        case "choices":
            return gr.CheckboxGroup(list(field.choices), value=[v for v in value if v in field.choices], **common)
        case "lines":
            return gr.Textbox(value, lines=3, **common)
        case "location" if offered:
            choices = list(dict.fromkeys(["", *offered, value]))
            return gr.Dropdown(choices, value=value, allow_custom_value=True, **common)
        case _:
            return gr.Textbox(value, lines=1, **common)

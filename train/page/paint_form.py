"""The form of the tab that generates: the settings that all kinds of generation share."""

from typing import Any, get_args

import gradio as gr

from conditioning import PromptWeights
from ldm.errors import UserError
from ldm.kinds import Spacing
from ldm.samplers import SamplerKind
from train.config.run import Precision
from train.config.sampling import SamplingOptions
from train.page.models import Traits
from train.page.shared import Page

OWN = "own"
"""Choice that leaves a setting to the model."""
CHOSEN = ("sampler", "spacing")
"""Settings that are the model's own unless the form chooses them."""
_GUIDANCE = SamplingOptions.guidance_scale


class Form:
    """The settings that all kinds of generation share."""

    def __init__(self, page: Page) -> None:
        self.places, names = page.places, page.places.model_names()
        with gr.Group():
            self.model = gr.Dropdown(
                names,
                value=names[0] if names else None,
                label="Model",
                info=self.traits(names[0] if names else None).line() or self.hint(),
                allow_custom_value=True,
                filterable=True,
                elem_id="model",
            )
            self.prompt = gr.Textbox(
                label="Prompt", lines=2, max_lines=6, placeholder="what the image shows; Control-Enter generates"
            )
            self.negative_prompt = gr.Textbox(label="Negative prompt", lines=1, max_lines=4)
        with gr.Group():
            with gr.Row():
                self.steps = gr.Number(0, label="Steps (0: own)", precision=0, minimum=0, maximum=1000, min_width=90)
                self.guidance_scale = gr.Number(_GUIDANCE, label="Guidance (CFG)", minimum=0, step=0.5, min_width=90)
                self.sampler = gr.Dropdown([OWN, *get_args(SamplerKind)], value=OWN, label="Sampler", min_width=140)
            with gr.Row():
                self.seed = gr.Number(-1, label="Seed (−1: any)", precision=0, minimum=-1, min_width=100)
                self.num_images = gr.Number(4, label="Images", precision=0, minimum=1, maximum=64, min_width=80)
                self.width = gr.Number(0, label="Width (0: own)", precision=0, minimum=0, min_width=80)
                self.height = gr.Number(0, label="Height (0: own)", precision=0, minimum=0, min_width=80)
        with gr.Accordion("More settings", open=False):
            with gr.Row():
                self.spacing = gr.Dropdown([OWN, *get_args(Spacing)], value=OWN, label="Spacing", min_width=120)
                self.eta = gr.Number(0.0, label="Eta (ddim)", minimum=0, maximum=1, step=0.1, min_width=90)
                self.guidance_rescale = gr.Number(
                    0.0, label="Guidance rescale", minimum=0, maximum=1, step=0.1, min_width=120
                )
            with gr.Row():
                self.prompt_weights = gr.Dropdown(
                    list(get_args(PromptWeights)), value="none", label="Prompt weights", min_width=120
                )
                self.precision = gr.Dropdown(list(get_args(Precision)), value="fp32", label="Precision", min_width=120)

    def traits(self, name: Any) -> Traits:
        """Return the traits of a model; none without one."""
        try:
            return Traits.read(self.places.model(name)) if name else Traits()
        except UserError:
            return Traits()

    def hint(self) -> str:
        """Return a line for a page without models."""
        return f"There is no model in {self.places.models} yet: train one (tab Train), or start the page with --models."

    def switched(self, name: Any, before: Traits) -> list[Any]:
        """Return the model field, its traits, and the steps, sampler and guidance after another model was chosen.

        Settings that were chosen for the model before stay, if the new one is sampled in the same way.
        """
        now = self.traits(name)
        model = gr.Dropdown(info=now.line() or (self.hint() if not name else ""))
        if (now.sampler, now.scales) == (before.sampler, before.scales) or not now.sampler:
            return [model, now if now.sampler else before, *[gr.skip()] * 3]
        low, high = now.scales or (_GUIDANCE, _GUIDANCE)
        return [model, now, 0, OWN, min(max(_GUIDANCE, low), high)]

    def fields(self) -> dict[str, gr.components.Component]:
        """Return the fields by the names of their options."""
        return {name: field for name, field in vars(self).items() if isinstance(field, gr.components.Component)}

    def read(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Return the values of the fields by the names of their options."""
        given = dict(zip(self.fields(), values, strict=True))
        return {name: None if value == OWN and name in CHOSEN else value for name, value in given.items()}

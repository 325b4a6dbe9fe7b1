"""The page: its tabs, in order."""

import gradio as gr

from train.page import paint
from train.page.shared import Page


def build(page: Page) -> gr.Blocks:
    """Return the whole page."""
    with gr.Blocks(title="ldm", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:  # noqa: SIM117, more tabs follow
        with gr.Tab("Paint", id="paint"):
            paint.tab(page)
    return blocks

"""The page: its tabs, in order."""

import gradio as gr

from train.page import compare, data, paint, training
from train.page.shared import Page


def build(page: Page) -> gr.Blocks:
    """Return the whole page."""
    with gr.Blocks(title="ldm", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        with gr.Tab("Paint", id="paint"):
            paint.tab(page)
        with gr.Tab("Train", id="train"):
            training.tab(page)
        with gr.Tab("Data", id="data"):
            data.tab(page)
        with gr.Tab("Compare", id="compare"):
            compare.tab(page)
    return blocks

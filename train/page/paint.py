"""The tab that generates images."""

import gradio as gr

from train.page.shared import Page


def tab(page: Page) -> None:
    """Add the tab to the page."""
    gr.Dropdown(page.places.model_names(), label="Model")

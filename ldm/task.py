"""The task of a model. A configuration or a saved pipeline names it; otherwise the number of channels decides."""

from typing import Literal, assert_never, get_args

from ldm.errors import UserError

Task = Literal["txt2img", "inpaint"]


def context_channels(task: Task, latent_channels: int) -> int:
    """Return the number of input channels besides the state: for inpaint, a mask and the masked image's latents."""
    match task:
        case "txt2img":
            return 0
        case "inpaint":
            return 1 + latent_channels
        case _:
            assert_never(task)


def task_by_channels(context: int, latent_channels: int) -> Task:
    """Return the task whose context has this number of channels. Raises UserError if there is none."""
    for task in get_args(Task):
        if context == context_channels(task, latent_channels):
            matching: Task = task
            return matching
    raise UserError(
        f"the network has {latent_channels + context} input channels, but the autoencoder's latents have "
        f"{latent_channels} channels: it needs {latent_channels} (txt2img) or {2 * latent_channels + 1} (inpaint); use "
        "a network and an autoencoder that were trained together"
    )

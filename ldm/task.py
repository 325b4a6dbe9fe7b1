"""What a model is for. A configuration or a saved pipeline says it; only where neither does, the channels tell."""

from typing import Literal, assert_never, get_args

from ldm.errors import UserError

Task = Literal["txt2img", "inpaint"]


def context_channels(task: Task, latent_channels: int) -> int:
    """Return how many channels the network sees beside its state, e.g. a mask and the latent of what the mask leaves."""
    match task:
        case "txt2img":
            return 0
        case "inpaint":
            return 1 + latent_channels
        case _:
            assert_never(task)


def task_by_channels(context: int, latent_channels: int) -> Task:
    """Return the task whose context has so many channels. Raises UserError where there is none."""
    for task in get_args(Task):
        if context == context_channels(task, latent_channels):
            found: Task = task
            return found
    raise UserError(
        f"the network takes {latent_channels + context} channels, the autoencoder's latents have {latent_channels} (to "
        f"inpaint, {2 * latent_channels + 1} are taken): they don't belong together"
    )

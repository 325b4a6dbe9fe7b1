"""Interpolate from one prompt to another, or from one seed to another: write the frames and an animation.

Noise is interpolated along an arc, because a straight line would make it shorter than noise of unit variance. Text
features are interpolated linearly: the UNet reads them through linear maps (keys and values of its cross-attention), so
halfway it receives the mean of both prompts. Tokens that both prompts share, such as the begin token, don't change.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.editing import slerp
from ldm.errors import UserError
from ldm.formats.png import slug
from ldm.samplers import make_sampler
from train.commands.generate import COMMAND_LINE, Session, check_seed, read_prompts, settings, warn_if_untrained
from train.commands.main import require_at_least, require_folder
from train.commands.outputs import image_key, key_of_gif, write_file, write_png
from train.commands.sizes import warn_if_far
from train.config.generation import InterpolateOptions


class Interpolation:
    """Interpolation from the first prompt and seed to the last."""

    def __init__(self, o: InterpolateOptions, session: Session = COMMAND_LINE) -> None:
        """Load the model and encode the prompts. Raises UserError for invalid options."""
        if o.to and o.prompts:
            raise UserError("--to and --prompts: give only one of them")
        self.prompts = [*read_prompts(o), *o.to]
        self.seeds = (o.seed, o.seed if o.to_seed is None else o.to_seed)
        if len(self.prompts) == 1:
            if o.to_seed is None:
                raise UserError(
                    "nothing to interpolate: give --to PROMPT, --prompts FILE with several prompts, or --to-seed SEED"
                )
            self.prompts *= 2
        require_folder(o.out)
        require_at_least(2, o, "frames")
        require_at_least(1, o, "batch_size")
        if not 1 <= o.fps <= 50:
            raise UserError(f"--fps {o.fps}: must be 1 to 50")
        for option, seed in zip(("--seed", "--to-seed"), self.seeds, strict=True):
            check_seed(option, seed)
        self.session, self.pipe = session, session.load(o, o.model)
        warn_if_untrained(o, self.pipe)
        self.o = o = o.for_sampler(self.pipe.process.sampler)
        sampler = o.sampler or self.pipe.process.sampler
        if make_sampler(sampler, o.eta).draws_noise and self.seeds[0] != self.seeds[1]:
            raise UserError(
                f"--sampler {sampler}: draws new noise at each step, which can't be interpolated between seeds; use "
                "e.g. dpmpp_2m"
            )
        own = ("to", "to_seed", "frames", "fps", "loop")  # saved in another form, see `frame_metadata`
        self.metadata = {name: value for name, value in settings(o).items() if name not in own}
        # Encoded separately, as in txt2img.py.
        self.features = [self.pipe.encode([prompt], o.prompt_weights) for prompt in self.prompts]
        warn_if_far(self.pipe, o.width, o.height)
        size = self.pipe.latent_size(o.height, o.width)
        self.shape = (1, self.pipe.autoencoder.latent_channels, *size)
        self.last = (len(self.prompts) - 1) * (o.frames - 1)

    def initial_noise(self, seed: int) -> tuple[Tensor, torch.Generator]:
        """Return a seed's initial noise (1, c, h, w), and the generator in the state after it has drawn the noise."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator), generator

    def latents(self, k: int) -> Tensor:
        """Return the initial noise (1, c, h, w) of frame k."""
        first, second = (self.initial_noise(seed)[0] for seed in self.seeds)
        return first if self.seeds[0] == self.seeds[1] else slerp(first, second, k / self.last)

    def condition(self, k: int) -> Tensor:
        """Return the text features (1, tokens, width) of frame k."""
        position = k / (self.o.frames - 1)  # among the prompts
        first = min(int(position), len(self.prompts) - 2)
        return torch.lerp(self.features[first], self.features[first + 1], position - first)

    def frame_metadata(self, k: int) -> dict[str, Any]:
        """Return the settings saved with frame k: prompt and seed of the nearer end, and the interpolation."""
        near = {"prompt": self.prompts[round(k / (self.o.frames - 1))], "seed": self.seeds[round(k / self.last)]}
        shown = {"frames": self.o.frames, "fps": self.o.fps, "loop": self.o.loop}
        interpolation = {"prompts": self.prompts, "seeds": self.seeds, **shown, "frame": k}
        return self.metadata | near | {"way": interpolation}

    def generate(self) -> Iterator[Image.Image]:
        """Yield the frames in order. Both ends are generated separately, so they equal the images of txt2img.py."""
        o = self.o
        between = range(1, self.last)
        batches = [between[i : i + o.batch_size] for i in range(0, len(between), o.batch_size)]
        for batch in ([0], *batches, [self.last]):
            yield from self.pipe(
                negative_prompt=o.negative_prompt,
                prompt_weights=o.prompt_weights,
                prompt_embeds=torch.cat([self.condition(k) for k in batch]),
                latents=torch.cat([self.latents(k) for k in batch]),
                generator=[self.initial_noise(o.seed)[1] for _ in batch],
                width=o.width,
                height=o.height,
                progress=self.session.on_step is None,
                callback_on_step_end=self.session.on_step,
                **o.sampling(),
            ).images


def animate(frames: list[Image.Image], fps: float, loop: bool, comment: str) -> bytes:
    """Return a GIF file. Each frame has its own palette and is not dithered.

    The PSNR of a shared palette is 6 to 10 dB lower, and with dithering even lower; both flicker.
    """
    repeat, file = {"loop": 0} if loop else {}, io.BytesIO()
    frames[0].save(
        file,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=round(100 / fps) * 10,
        comment=comment.encode(),
        **repeat,
    )
    return file.getvalue()


def interpolate(o: InterpolateOptions, session: Session = COMMAND_LINE) -> Iterator[Path]:
    """Generate and write the frames and the animation, and yield the path of each file.

    Files with other settings aren't overwritten; see `write_file`. The other files are named after the first frame.
    """
    interpolation = Interpolation(o, session)
    folder, frames = Path(o.out), []
    seeds = "-".join(map(str, dict.fromkeys(interpolation.seeds)))
    name = f"{slug(' to '.join(interpolation.prompts))}-{seeds}"
    for k, image in enumerate(interpolation.generate()):
        folder.mkdir(parents=True, exist_ok=True)
        saved, ending = interpolation.frame_metadata(k), f"-{k:04}.png"
        path = write_png(image, folder, name + ending, saved, ending, interpolation.pipe.process.spacing)
        name = path.name.removesuffix(ending) if k == 0 else name
        yield path
        frames.append(image)
    key = image_key(interpolation.frame_metadata(0))
    yield write_file(animate(frames, o.fps, o.loop, key), folder, name, ".gif", key, key_of_gif)

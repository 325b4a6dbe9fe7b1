"""The settings shared by the stages that train a network on latents."""

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from ldm.kinds import AttentionBackend
from train.config.limits import MOST_EXAMPLES, MOST_STEPS, PathText
from train.config.optimizer import strict
from train.config.resumable import ON_REQUEST, Resumable
from train.config.run import Precision, RunConfig, require_cache


@dataclass(frozen=True, kw_only=True, config=strict)
class LatentConfig(RunConfig):
    """Settings of the stages that train a network on latents: stage 2, and distillation."""

    attention: Annotated[AttentionBackend, Resumable()] = "sdpa"
    """Attention implementation: `sdpa` (torch), `xformers` or `auto` (xformers if it works, else sdpa).
    `xformers` needs a GPU and `pip install xformers`."""
    encode_once: Annotated[bool, ON_REQUEST] = False
    """Take what stage 1 has stored with the same setting, `precision` and images, instead of encoding them again.
    The encoder runs in `precision` (fp16: fp32). The cache has its outputs before the last layer (docs/cache.md).
    Else it has those of the complete encoder in fp32."""
    gradient_checkpointing: Annotated[bool, ON_REQUEST] = False
    """Recompute activations in the backward pass instead of storing them: about a third slower, much less memory."""
    validation_examples: Annotated[int, Resumable()] = Field(default=512, gt=0, le=MOST_EXAMPLES)
    """Largest number of held-out examples in the validation loss; their timesteps and noise are always the same.
    If there are more, the seed chooses them."""
    validation_draws: Annotated[int, Resumable()] = Field(default=1, gt=0, le=1000)
    """Number of times that each of them is measured, at evenly spaced noise levels; more for small datasets."""
    keep_best: Annotated[bool, Resumable()] = False
    """Keep the averaged weights with the smallest validation loss in model-best/, a complete model like model/.
    It is as large as model/, and is written at each validation with a new minimum."""
    evaluate_every: Annotated[int, Resumable()] = Field(default=0, ge=0, le=MOST_STEPS)
    """Number of steps between two evaluations of generated images, at the next validation; 0: none.
    They measure the distance to held-out images, val_frechet and val_kid. The weights are the same as without them."""
    evaluation_images: Annotated[int, Resumable()] = Field(default=64, ge=2, le=MOST_EXAMPLES)
    """Largest number of images that are generated for an evaluation, from held-out captions."""
    evaluation_features: Annotated[PathText, Resumable(location=True)] = ""
    """Network of the evaluation's features: inception, dinov2, clip, or the folder or hub id of a CLIP or DINOv2.
    Empty: the CLIP in `text_encoder`; in distillation, it must be given."""
    prompts: Annotated[tuple[str, ...], Resumable()] = ()
    """Prompts of the sample sheets, one image each; empty: captions of held-out images."""
    sample_steps: Annotated[int, Resumable()] = Field(default=25, gt=0, le=100_000)
    """Number of sampler steps for the sample sheets."""
    guidance_scale: Annotated[float, Resumable()] = Field(default=3.0, ge=0)
    """Guidance scale for the sample sheets: 1 is no guidance; larger values follow the prompt more closely."""

    @model_validator(mode="after")
    def _crops_fit_the_cache(self) -> Self:
        require_cache(self)
        crop, crops = self.input.crop, self.input.crops
        if self.cache == "off" and crops:
            raise ValueError(
                f"input.crops {crops} with cache off: crops are kept only in a cache; "
                "set input.crops to 0, or leave out cache off"
            )
        if self.cache != "off" and crop == "random" and not crops:
            raise ValueError(
                "input.crop random with a cache: set the number of cached crops of each image, e.g. --input.crops 4, "
                "or give --cache off"
            )
        return self

    @property
    def sampling_precision(self) -> Precision:
        """Precision in which images are generated in training: fp32 for fp16, whose overflow would end the run."""
        return "bf16" if self.precision == "bf16" else "fp32"

    @property
    def own_features(self) -> str:
        """Folder or hub id whose CLIP is the default network of `evaluation_features`."""
        return ""

"""Auxiliary tasks that make every token of a small text tower informative, besides the contrastive loss.

A contrastive loss reads only the end token and hardly needs the order of words, since captions in a batch rarely have
the same words. The diffusion reads every token and must find out which object is where. Two decoders train for this
together with the tower and are then discarded:

- `Sketch` predicts the image from the tokens. The prediction with the least squared error is E[image | caption],
  which is also the diffusion's prediction at pure noise.
- `Echo` predicts the latest words at each token. An object's attributes are then together in one token, with strong
  features: words that the mean image hardly distinguishes (a circle, a square) keep different features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sketch(nn.Module):
    """Decoder of tokens to an image. Each patch has a learned query that attends once to the tokens, with one head.

    Patches are predicted independently. With a single attention, all that a patch needs about an object must be in one
    token.
    """

    def __init__(self, *, width: int, patch_size: int, image_size: int) -> None:
        """Build the decoder for tokens of width `width`; `patch_size` divides `image_size`."""
        super().__init__()
        self.patch_size, self.side = patch_size, image_size // patch_size
        self.queries = nn.Parameter(torch.randn(self.side**2, width) / 2)
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.paint = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * patch_size**2))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (b, n, width) to images (b, 3, image_size, image_size), in the training images' range."""
        query = self.query(self.queries).expand(len(tokens), -1, -1)  # (b, patches, width)
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        x = self.queries + self.out(F.scaled_dot_product_attention(query, key, value))
        x = self.paint(x + self.mix(x))  # (b, patches, 3 patch_size²)
        return F.pixel_shuffle(x.mT.unflatten(2, (self.side, self.side)), self.patch_size)


class Echo(nn.Module):
    """Linear prediction of fixed random codes of a token and of the `words` − 1 tokens before it, from its features."""

    codes: Tensor

    def __init__(self, *, width: int, vocab_size: int, words: int = 4, code: int = 32) -> None:
        super().__init__()
        self.words = words
        self.repeat = nn.Linear(width, words * code)
        self.register_buffer("codes", torch.randn(vocab_size, code))

    def forward(self, tokens: Tensor, input_ids: Tensor, end_id: int) -> Tensor:
        """Return the mean squared error of the predicted codes, a scalar; an error of 1 means that nothing was learned.

        The mean is over each caption's tokens up to its end token.

        tokens (b, n, width), input_ids (b, n).
        """
        end = input_ids == end_id
        in_caption = end.cumsum(1) - end.int() == 0  # (b, n): the first end token and all before it
        repeated = self.repeat(tokens).unflatten(-1, (self.words, -1))  # (b, n, words, code)
        codes = self.codes[input_ids]
        errors = []
        for back in range(min(self.words, tokens.shape[1])):
            error = (repeated[:, back:, back] - codes[:, : codes.shape[1] - back]).float().square().mean(-1)
            here = in_caption[:, back:]
            of_captions = (error * here).sum(1) / here.sum(1).clamp(min=1)  # (b,), the same for any split of the batch
            errors.append(of_captions.mean())
        return torch.stack(errors).mean()


class TokenTasks(nn.Module):
    """Sketch and echo, each with its weight in the loss; weight 0 turns a task off."""

    def __init__(
        self, *, sketch_weight: float, echo_weight: float, width: int, vocab_size: int, patch_size: int, image_size: int
    ) -> None:
        super().__init__()
        self.sketch_weight, self.echo_weight = sketch_weight, echo_weight
        if sketch_weight:
            self.sketch = Sketch(width=width, patch_size=patch_size, image_size=image_size)
        if echo_weight:
            self.echo = Echo(width=width, vocab_size=vocab_size)

    def forward(
        self, tokens: Tensor, input_ids: Tensor, end_id: int, pixels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss, a scalar, and detached metrics.

        tokens (b, n, d), input_ids (b, n), pixels (b, 3, h, w) in [-1, 1].
        """
        loss, metrics = tokens.new_zeros((), dtype=torch.float32), {}
        if self.sketch_weight:
            error = F.mse_loss(self.sketch(tokens).float(), pixels)
            loss, metrics["sketch_mse"] = loss + self.sketch_weight * error, error.detach()
        if self.echo_weight:
            error = self.echo(tokens, input_ids, end_id)
            loss, metrics["echo_mse"] = loss + self.echo_weight * error, error.detach()
        return loss, metrics

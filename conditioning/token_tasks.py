"""What a small text tower must learn besides telling captions apart, so that every token is worth reading.

A contrastive loss reads the end token alone, and hardly ever needs the order of words: in a batch no two captions hold
the same ones. The diffusion reads every token, and must find in them what stands where. Two decoders, trained with the
tower and then thrown away, ask for that:

- `Sketch` paints the picture from the tokens. The least squared error is that of E[picture | caption], which is also
  what the diffusion predicts where the noise hides everything.
- `Echo` repeats at each token the words just said. An object's attributes then stand together in one token, and loudly:
  two words of which the mean picture says little (a circle, a square) keep features of their own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sketch(nn.Module):
    """Each patch of the picture is a learned query that looks at the tokens once, with one head, and is painted alone.

    With a single look, what a patch needs of an object has to stand in one token.
    """

    def __init__(self, *, width: int, patch_size: int, image_size: int) -> None:
        """`width` is that of the tokens; `patch_size` divides `image_size`."""
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
        """(b, n, width) → (b, 3, image_size, image_size), of the scale of the pictures."""
        query = self.query(self.queries).expand(len(tokens), -1, -1)  # (b, patches, width)
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        x = self.queries + self.out(F.scaled_dot_product_attention(query, key, value))
        x = self.paint(x + self.mix(x))  # (b, patches, 3 patch_size²)
        return F.pixel_shuffle(x.mT.unflatten(2, (self.side, self.side)), self.patch_size)


class Echo(nn.Module):
    """Predict linearly, from the features of a token, fixed random codes of it and of the `words` − 1 tokens before it."""

    codes: Tensor

    def __init__(self, *, width: int, vocab_size: int, words: int = 4, code: int = 32) -> None:
        super().__init__()
        self.words = words
        self.repeat = nn.Linear(width, words * code)
        self.register_buffer("codes", torch.randn(vocab_size, code))

    def forward(self, tokens: Tensor, input_ids: Tensor, end_id: int) -> Tensor:
        """(b, n, width), (b, n) → squared error (), a mean over each caption's tokens up to its end; 1 for no idea."""
        end = input_ids == end_id
        said = end.cumsum(1) - end.int() == 0  # (b, n): the first end token and all before it
        repeated = self.repeat(tokens).unflatten(-1, (self.words, -1))  # (b, n, words, code)
        codes = self.codes[input_ids]
        errors = []
        for back in range(min(self.words, tokens.shape[1])):
            error = (repeated[:, back:, back] - codes[:, : codes.shape[1] - back]).float().square().mean(-1)
            here = said[:, back:]
            of_captions = (error * here).sum(1) / here.sum(1).clamp(min=1)  # (b,), so that any split has one mean
            errors.append(of_captions.mean())
        return torch.stack(errors).mean()


class TokenTasks(nn.Module):
    """Sketch and echo, each with its weight in the loss; a weight of 0 leaves it out."""

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
        """Tokens (b, n, d), ids (b, n), pictures (b, 3, h, w) in [-1, 1] → weighted loss () and detached metrics."""
        loss, metrics = tokens.new_zeros((), dtype=torch.float32), {}
        if self.sketch_weight:
            error = F.mse_loss(self.sketch(tokens).float(), pixels)
            loss, metrics["sketch_mse"] = loss + self.sketch_weight * error, error.detach()
        if self.echo_weight:
            error = self.echo(tokens, input_ids, end_id)
            loss, metrics["echo_mse"] = loss + self.echo_weight * error, error.detach()
        return loss, metrics

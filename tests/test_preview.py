"""Colours of latents: a least-squares fit, exact for a linear decoder, over any batches and processes."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import train.stages.vae
from autoencoder.model import Autoencoder, Posterior
from autoencoder.preview import Colours, fit_colours
from ldm.errors import RunError, UserError
from support import draws
from support.models import small_autoencoder, tiny_pipeline
from support.runs import train_in_processes, vae_config
from train.config.optimizer import OptimizerConfig
from train.data.batches.images import ImageDataset
from train.data.images.crop import Framing
from train.data.sources.splits import open_source

WEIGHT = torch.tensor([[0.5, 0.1, -0.2], [0.0, -0.3, 0.1], [0.2, 0.2, 0.4]])
BIAS = torch.tensor([0.1, -0.2, 0.05])


draw = partial(draws.draw, dtype=torch.float32)


def codec(encode, channels, factor=2):
    """Return a stand-in for an autoencoder."""
    return SimpleNamespace(encode=encode, latent_channels=channels, factor=factor, vae=torch.empty(0))


def linear(std=0.0):
    """Return an autoencoder whose decoder gives each latent a square of colour WEIGHT z + BIAS."""

    def encode(pixels):
        mean = torch.einsum("ck,bkhw->bchw", WEIGHT.inverse(), F.avg_pool2d(pixels, 2) - BIAS.view(3, 1, 1))
        return Posterior(mean, torch.full_like(mean, std))

    return codec(encode, 3)


def decoded(z):
    colours = torch.einsum("kc,bchw->bkhw", WEIGHT, z) + BIAS.view(3, 1, 1)
    return colours.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_the_fit_recovers_a_linear_decoder():
    z = 0.3 * draw(8, 3, 6, 5)
    colours = fit_colours(linear(), [decoded(z)])
    expected = F.pad(WEIGHT[:, :, None, None], (1, 1, 1, 1))  # neighbours have no effect
    torch.testing.assert_close(colours.weight, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(colours.bias, BIAS, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(colours(z), F.avg_pool2d(decoded(z), 2).clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert colours(50 * z).abs().max() == 1


def test_a_pipeline_shows_the_colours_of_its_latents():
    pipe, z = tiny_pipeline(), 2 * draw(2, 4, 16, 16)
    with pytest.raises(UserError, match="fit_colours"):
        pipe.preview(z)
    weight = torch.zeros(3, 4, 3, 3)
    weight[0, 3, 1, 1], weight[1, 0, 1, 1], weight[2, 1, 1, 1] = 1.0, 0.5, -1.0
    pipe.autoencoder.colours = Colours(weight, torch.tensor([0.0, 0.5, 0.0]))
    channels = (z[:, 3], 0.5 * z[:, 0] + 0.5, -z[:, 1])
    expected = (127.5 * torch.stack(channels, -1).clamp(-1, 1) + 127.5).round()
    shown = np.stack([np.asarray(image) for image in pipe.preview(z)])
    assert np.abs(shown - expected.numpy()).max() <= 1
    assert shown.std() > 50


def test_the_fit_recovers_a_decoder_of_3_by_3_latents():
    weight = 0.1 * draw(3, 3, 3, 3, seed=3)
    z = draw(8, 3, 6, 5)
    pixels = F.conv2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), weight, BIAS).repeat_interleave(2, 2)
    given = codec(lambda _: Posterior(z, torch.zeros_like(z)), 3)
    colours = fit_colours(given, [pixels.repeat_interleave(2, 3)])
    torch.testing.assert_close(colours.weight, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(colours.bias, BIAS, rtol=1e-4, atol=1e-5)


def test_the_fit_accounts_for_posterior_sampling():
    z, pixels = 0.3 * draw(4, 3, 24, 20), draw(4, 3, 48, 40, seed=1).tanh()
    pixels = pixels + decoded(z)
    samples = [z + 0.2 * draw(4, 3, 24, 20, seed=100 + k) for k in range(300)]
    drawn = iter(samples)
    given = codec(lambda _: Posterior(next(drawn), torch.zeros_like(z)), 3)
    by_sampling = fit_colours(given, [pixels] * len(samples))
    at_once = fit_colours(codec(lambda _: Posterior(z, torch.full_like(z, 0.2)), 3), [pixels])
    without = fit_colours(codec(lambda _: Posterior(z, torch.zeros_like(z)), 3), [pixels])
    error, difference = ((c.weight - at_once.weight).norm() for c in (by_sampling, without))
    assert error < 0.15 * difference


def test_the_fit_does_not_depend_on_batches():
    autoencoder, x = small_autoencoder(), draw(12, 3, 16, 16).tanh()
    once, parts = (fit_colours(autoencoder, batches) for batches in ([x], x.split([1, 7, 4])))
    for a, b in zip(once, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    ragged = fit_colours(autoencoder, [x[..., :15, :11]])  # sides that are not multiples of the factor
    assert ragged(autoencoder.encode(x[..., :15, :11]).mean).shape == (12, 3, 8, 6)


def test_images_without_information_are_fitted_or_refused():
    grey = torch.full((2, 3, 8, 8), 0.25)
    still = codec(lambda x: Posterior(torch.zeros(len(x), 3, 4, 4), torch.zeros(len(x), 3, 4, 4)), 3)
    torch.testing.assert_close(fit_colours(still, [grey])(draw(1, 3, 4, 4)), torch.full((1, 3, 4, 4), 0.25))
    with pytest.raises(UserError, match="no images"):
        fit_colours(linear(), [])
    with pytest.raises(RunError, match="finite"):
        fit_colours(linear(), [grey * torch.nan])


def test_colours_are_saved_next_to_the_weights(tmp_path, capfd, recwarn):
    autoencoder = small_autoencoder()
    autoencoder.save(tmp_path / "plain")
    assert Autoencoder.load(tmp_path / "plain").colours is None
    autoencoder.colours = fit_colours(autoencoder, [draw(4, 3, 16, 16).tanh()])
    autoencoder.save(tmp_path / "pipeline" / "vae")
    capfd.readouterr()
    for where in ("pipeline", "pipeline/vae"):
        read = Autoencoder.load(tmp_path / where)
        assert all(torch.equal(a, b) for a, b in zip(read.colours, autoencoder.colours, strict=True))
    AutoencoderKL.from_pretrained(tmp_path / "pipeline" / "vae")
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


def numbers(channels: int, other: str = "1") -> str:
    """Return a file of colours, with `other` as its last number."""
    kernel = [[[1] * 3] * 3] * channels
    return f'{{"weight": {[kernel, kernel, kernel]}, "bias": [0, 0, {other}]}}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        '{"weight": [[1, 2, 3, 4]]}',
        '{"weight": "red", "bias": [0, 0, 0]}',
        numbers(3),
        numbers(4, "NaN"),
        numbers(4, "1e999"),
        numbers(4, "[2]"),
        "[" * 100_000,
    ],
)
def test_invalid_files_of_colours_are_refused_in_one_line(text, tmp_path):
    small_autoencoder().save(tmp_path)
    (tmp_path / "preview.json").write_text(text)
    with pytest.raises(UserError, match=r"preview\.json") as raised:
        Autoencoder.load(tmp_path)
    assert "\n" not in str(raised.value)
    (tmp_path / "preview.json").write_text(numbers(4))
    assert Autoencoder.load(tmp_path).colours is not None


def test_stage_1_saves_colours(shapes: Path, tmp_path: Path):
    """Colours are fitted to the latents of the saved model, also if only the decoder was trained."""
    train.stages.vae.train(vae_config(shapes, tmp_path / "all", steps=2))
    given = {"init": str(tmp_path / "all/model"), "decoder_only": True}
    train.stages.vae.train(vae_config(shapes, tmp_path / "decoder", steps=2, **given))
    plain = ImageDataset(open_source(shapes, "train"), Framing(resolution=32), 0, shuffle=False)
    for run in ("all", "decoder"):
        autoencoder = Autoencoder.load(tmp_path / run / "model")
        again = fit_colours(autoencoder, [plain.__getitems__(range(64)).pixels])
        for a, b in zip(autoencoder.colours, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_two_processes_fit_as_one(shapes: Path, tmp_path: Path):
    for count, name in ((1, "one"), (2, "two")):
        config = vae_config(shapes, tmp_path / name, steps=1, optimizer=OptimizerConfig(lr=1e-9))
        train_in_processes(config, count)
    one, two = (Colours.load(tmp_path / out / "model", 4) for out in ("one", "two"))
    assert one is not None
    assert two is not None
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

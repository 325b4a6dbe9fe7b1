"""Tiles give the untiled result: exactly for a local network, and with the group norms of the whole image."""

from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.model import build_autoencoder
from autoencoder.tiling import Span, Tile, Tiles, pad_to_multiple, spans, tiled, windows
from ldm.errors import UserError
from support.draws import draw
from train.commands.main import tiles as tiles_of

SIDES = [1, 3, 7, 8, 9, 12, 13, 17, 29, 40]
TILES = [Tiles(8, 4), Tiles(8, 3), Tiles(8, 0), Tiles(5, 2), Tiles(1, 0), Tiles(2, 1)]


def smooth(*shape: int) -> Tensor:
    """Return a random field that varies over a quarter of a side."""
    coarse = draw(*shape[:2], 5, 5)
    return F.interpolate(coarse, size=shape[2:], mode="bicubic", align_corners=True)


def vae(*, channels: tuple[int, ...] = (8, 16), attention: bool = False) -> AutoencoderKL:
    """Return an autoencoder with random residual branches, which are otherwise zero at initialisation."""
    torch.manual_seed(0)
    made = build_autoencoder(channels=channels, layers=1, latent_channels=4, groups=4, attention=attention)
    for name, module in made.named_modules():
        if name.endswith(".conv2"):
            module.reset_parameters()
    return made.double().eval().requires_grad_(False)


def decode(network: AutoencoderKL):
    return lambda z: network.decode(z).sample


def encode(network: AutoencoderKL):
    """Return a function to mean and deviation, concatenated."""

    def run(x: Tensor) -> Tensor:
        q = network.encode(x).latent_dist
        return torch.cat([q.mean, q.std], 1)

    return run


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("n", SIDES)
def test_tiles_cover_an_axis(n: int, tiles: Tiles) -> None:
    along = spans(n, tiles)
    assert {s.stop - s.start for s in along} == {min(n, tiles.side)}
    assert (along[0].start, along[-1].stop) == (0, n)
    for one, two in pairwise(along):
        assert two.start > one.start
        assert one.stop - two.start >= tiles.overlap
    own = [i for s in along for i in range(s.start + s.own.start, s.start + s.own.stop)]
    assert own == list(range(n))
    assert all(0 <= s.own.start < s.own.stop <= s.stop - s.start for s in along)


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("n", SIDES)
def test_weights_are_a_partition_of_unity_without_rims(n: int, tiles: Tiles, scale: int) -> None:
    along = spans(n, tiles)
    total, rim = torch.zeros(n * scale, dtype=torch.float64), tiles.overlap // 4 * scale
    for span, weight in zip(along, windows(along, tiles.overlap, scale), strict=True):
        total[span.start * scale : span.stop * scale] += weight
        assert (weight >= 0).all()
        assert span.start == 0 or (weight[:rim] == 0).all()
        assert span.stop == n or (weight[len(weight) - rim :] == 0).all()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-15)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (9, 12), (13, 29), (17, 8)])
def test_any_size_is_reproduced_and_no_input_exceeds_a_tile(size: tuple[int, int], tiles: Tiles) -> None:
    seen = []

    def enlarge(z: Tensor) -> Tensor:
        seen.append(tuple(z.shape[-2:]))
        return z.repeat_interleave(3, -1).repeat_interleave(3, -2)

    def reduce(x: Tensor) -> Tensor:
        seen.append(tuple(n // 3 for n in x.shape[-2:]))
        return F.avg_pool2d(x, 3)

    z = draw(2, 3, *size)
    x = enlarge(z)
    seen.clear()
    torch.testing.assert_close(tiled(enlarge, z, tiles, up=3), x, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(tiled(reduce, x, tiles, down=3), z, rtol=1e-14, atol=1e-14)
    assert set(seen) == {tuple(min(n, tiles.side) for n in size)}
    if max(size) <= tiles.side:
        assert len(seen) == 2


def test_constants_and_slopes_are_kept_in_float32() -> None:
    tiles = Tiles(8, 4)
    slope = torch.linspace(-1, 1, 52).expand(1, 1, 36, 52)
    for x in (torch.ones(1, 1, 36, 52), slope, slope.mT):
        torch.testing.assert_close(tiled(lambda t: t, x, tiles), x, rtol=0, atol=3e-7)


def test_half_precision_is_accumulated_in_float32() -> None:
    x = draw(1, 2, 20, 20).bfloat16()
    assert tiled(lambda t: t, x, Tiles(8, 4)).dtype == tiled(lambda t: t, x, Tiles(32, 8)).dtype == torch.float32
    torch.testing.assert_close(tiled(lambda t: t, x, Tiles(8, 4)), x.float())


@torch.no_grad()
def test_a_network_whose_receptive_field_fits_the_rim_is_exact() -> None:
    torch.manual_seed(0)
    # The receptive field is 2 latents, as far as the zero padding at inner borders reaches.
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 5, padding=2)
    ).double()
    z = draw(1, 3, 23, 40)
    untiled = network(z)
    torch.testing.assert_close(tiled(network, z, Tiles(16, 8), up=2), untiled, rtol=0, atol=1e-13)
    assert (tiled(network, z, Tiles(16, 4), up=2) - untiled).abs().max() > 1e-3  # with a rim of 1


@pytest.mark.parametrize("attention", [False, True])
@torch.no_grad()
def test_a_tiled_autoencoder_equals_the_untiled_one(attention: bool) -> None:
    """The receptive field is 13 latents, there are 17 group norms (12 in the encoder), and the results are equal.

    The attention of the parametrised case has its own group norm, but its output is still zero.
    """
    network, tiles = vae(attention=attention), Tiles(108, 54)
    z, x = draw(2, 4, 3, 150), draw(2, 3, 6, 300, seed=1)
    untiled = network.decode(z).sample
    exact = tiled(decode(network), z, tiles, up=2, network=network.decoder)
    torch.testing.assert_close(exact, untiled, rtol=0, atol=1e-11)
    assert (tiled(decode(network), z, tiles, up=2) - untiled).abs().max() > 1e-2  # with the statistics of each tile
    latents = tiled(encode(network), x, tiles, down=2, network=network.encoder)
    torch.testing.assert_close(latents, encode(network)(x), rtol=0, atol=1e-11)


def test_the_own_part_of_an_activation() -> None:
    tile = Tile(Span(0, 6, slice(0, 4)), Span(4, 8, slice(1, 4)))
    x = draw(2, 3, 12, 8)  # two elements per latent
    assert torch.equal(tile.own(x), x[..., :8, 2:8])
    assert torch.equal(tile.own(x.flatten(2)), x[..., :8, 2:8])


def decibels(error: Tensor, signal: Tensor) -> float:
    return float(10 * torch.log10(signal.var() / error.square().mean()))


def jumps(x: Tensor, lines: list[int]) -> float:
    """Return the mean difference of the rows and columns on both sides of these lines."""
    before = torch.tensor(lines) - 1
    return float(x.diff(dim=-1)[..., before].abs().mean() + x.diff(dim=-2)[..., before, :].abs().mean())


@torch.no_grad()
def test_statistics_of_the_whole_remove_tones_and_seams() -> None:
    """On a smooth field, with residual branches as weak as in trained networks: distant latents have little effect."""
    network, z, tiles = vae(), smooth(1, 4, 32, 32), Tiles(16, 8)
    for name, module in network.named_modules():
        if name.endswith(".conv2"):
            module.weight *= 0.25
    untiled = network.decode(z).sample
    lines = [2 * line for line in (8, 12, 16, 20, 24)]  # the starts, ends and middles of overlaps
    own = tiled(decode(network), z, tiles, up=2)
    exact = tiled(decode(network), z, tiles, up=2, network=network.decoder)
    assert decibels(own - untiled, untiled) < 10
    assert decibels(exact - untiled, untiled) > 30
    assert jumps(exact, lines) < 1.04 * jumps(untiled, lines)
    assert jumps(exact - untiled, lines) < 0.25 * jumps(own - untiled, lines)
    # Without blending there is a step at every border.
    assert jumps(tiled(decode(network), z, Tiles(16, 0), up=2), [32]) > 1.5 * jumps(untiled, [32])


@torch.no_grad()
def test_the_network_is_left_as_it_was() -> None:
    network, z = vae(), draw(1, 4, 12, 12)
    before = network.decode(z).sample
    tiled(decode(network), z, Tiles(8, 4), up=2, network=network.decoder)
    assert torch.equal(network.decode(z).sample, before)
    with pytest.raises(ValueError, match="not"):
        tiled(decode(network), z, Tiles(8, 4), up=4, network=network.decoder)
    assert torch.equal(network.decode(z).sample, before)


@torch.no_grad()
def test_an_image_no_larger_than_a_tile_is_run_once() -> None:
    network, z = vae(attention=True), draw(1, 4, 7, 12)
    assert torch.equal(tiled(decode(network), z, Tiles(12, 4), up=2, network=network.decoder), network.decode(z).sample)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (9, 31)])
def test_padding_repeats_the_last_row_and_column(size: tuple[int, int]) -> None:
    x = draw(2, 3, *size)
    padded = pad_to_multiple(x, 8)
    height, width = size
    assert padded.shape[-2:] == (-(-height // 8) * 8, -(-width // 8) * 8)
    assert torch.equal(padded[..., :height, :width], x)
    assert (padded[..., height:, :] == padded[..., height - 1 : height, :]).all()
    assert (padded[..., width:] == padded[..., width - 1 : width]).all()


def test_refusals_name_the_value() -> None:
    with pytest.raises(UserError, match="side 0"):
        Tiles(0, 0)
    with pytest.raises(UserError, match=r"overlap 9.*0 to 8"):
        Tiles(16, 9)
    with pytest.raises(UserError, match="-1"):
        Tiles(16, -1)
    with pytest.raises(UserError, match=r"30 × 17.*multiples of 4"):
        tiled(lambda t: t, draw(1, 3, 17, 30), Tiles(16, 4), down=4)


def test_commands_refuse_tiles_that_would_take_hours() -> None:
    assert tiles_of(None) is None
    assert tiles_of(4) == Tiles(4, 1)
    for side in (-1, 0, 1, 3):
        with pytest.raises(UserError, match=f"--tile {side}: must be at least 4 latents, e.g. 64"):
            tiles_of(side)

"""Image to image and inpainting: equality with diffusers, exact unmasked pixels, and invalid arguments."""

import io
import itertools

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw

from ldm.editing import (
    BlendedStep,
    fill_masked_area,
    inpaint_masks,
    latent_mask,
    steps_for_strength,
    to_mask,
    to_pixels,
)
from ldm.errors import UserError
from ldm.formats.images import to_rgb
from ldm.schedule import Schedule
from support.draws import generators
from support.images import box_mask, smooth_images
from support.models import PROMPTS, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


# -- diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
def test_image_to_image_equals_stock_diffusers(pipe, saved, sampler, strength):
    from diffusers import DPMSolverMultistepScheduler

    stock = StableDiffusionImg2ImgPipeline.from_pretrained(saved)
    stock.set_progress_bar_config(disable=True)
    if sampler == "dpmpp_2m":
        stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    how = {"strength": strength, "num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "np"}
    theirs = stock(PROMPTS, image=smooth_images(2), generator=generators(2), **how).images
    ours = pipe(PROMPTS, image=smooth_images(2), generator=generators(2), sampler=sampler, **how).images
    assert np.abs(ours - theirs).max() <= 2 / 255
    assert ours.std() > 0.05


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_equals_stock_diffusers(pipe, saved, strength):
    """Latents are compared, before pasting. The mask's borders are multiples of the autoencoder's factor."""
    stock = StableDiffusionInpaintPipeline.from_pretrained(saved)
    stock.set_progress_bar_config(disable=True)
    how = {"strength": strength, "num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "latent"}
    theirs = stock(
        PROMPTS, image=smooth_images(2), mask_image=box_mask(), generator=generators(2), height=32, width=32, **how
    ).images
    ours = pipe(
        PROMPTS, image=smooth_images(2), mask_image=box_mask(), generator=generators(2), sampler="ddim", **how
    ).images
    ours, theirs = (pipe.decode(z.to(torch.float32) / s) for z, s in ((ours, 1), (theirs, 1)))
    assert (ours - theirs).abs().max() <= 2 / 255


# -- nearly black masks ---------------------------------------------------------------------------------------------


def test_a_mask_of_up_to_7_of_255_is_black():
    mask = Image.new("L", (4, 1))
    for x, value in enumerate((7, 8, 128, 255)):
        mask.putpixel((x, 0), value)
    torch.testing.assert_close(to_mask(mask, (1, 4)).flatten(), torch.tensor([0, 8, 128, 255]) / 255, rtol=0, atol=0)


# -- strength -------------------------------------------------------------------------------------------------------


def test_strength_is_the_share_of_steps_that_are_taken():
    assert [steps_for_strength(s, 25) for s in (0, 0.001, 0.04, 0.28, 0.6, 0.999, 1)] == [0, 1, 1, 7, 15, 24, 25]
    assert steps_for_strength(0.29, 100) == 29  # binary fractions give 28.999…
    for odd in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="strength"):
            steps_for_strength(odd, 10)


def test_strength_1_is_text_to_image_and_strength_0_is_the_autoencoder(pipe):
    given = smooth_images(2)
    how = {"num_inference_steps": 4, "output_type": "np"}
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    one = pipe(PROMPTS, image=given, strength=1.0, latents=noise, generator=generators(2), **how).images
    np.testing.assert_array_equal(one, pipe(PROMPTS, latents=noise, **how).images)
    seeded = pipe(PROMPTS, image=given, strength=1.0, generator=generators(2), **how).images
    np.testing.assert_array_equal(seeded, pipe(PROMPTS, generator=generators(2), **how).images)
    none = pipe(PROMPTS, image=given, strength=0.0, generator=generators(2), **how).images
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in given])).movedim(-1, 1) / 127.5 - 1
    z = [
        pipe.autoencoder.encode(x[None]).sample(torch.randn(1, 4, 16, 16, generator=g))
        for x, g in zip(pixels, generators(2), strict=True)
    ]
    expected = pipe.decode(torch.cat(z)).movedim(1, -1).numpy()
    np.testing.assert_allclose(none, expected, atol=1e-5)


# -- masks ----------------------------------------------------------------------------------------------------------


def test_outside_the_mask_nothing_changes(pipe):
    """A hundred masks with odd sizes, thin lines and grey edges."""
    rng = np.random.default_rng(0)
    for k in range(100):
        size = tuple(int(n) for n in rng.integers(17, 45, 2))
        (given,), mask = smooth_images(1, size, k), Image.new("L", size)
        draw = ImageDraw.Draw(mask)
        for _ in range(3):
            ends = [int(rng.integers(0, size[i % 2])) for i in range(4)]
            if k % 2:
                draw.line(ends, int(rng.integers(8, 256)), 1)
            else:
                draw.ellipse([*map(min, ends[:2], ends[2:]), *map(max, ends[:2], ends[2:])], 255)
        (made,) = pipe(PROMPTS[0], image=given, mask_image=mask, num_inference_steps=1, generator=generators(1)).images
        assert made.size == size
        outside = np.asarray(mask) == 0
        np.testing.assert_array_equal(np.asarray(made)[outside], np.asarray(given)[outside])
        assert (np.asarray(made)[~outside] != np.asarray(given)[~outside]).any()


@pytest.mark.parametrize("line", [(100, 0, 100, 511), (0, 333, 511, 333), (0, 0, 511, 511)])
def test_a_line_of_one_pixel_reaches_the_latents(line):
    mask = Image.new("L", (512, 512))
    ImageDraw.Draw(mask).line(line, 255, 1)
    small = latent_mask(to_mask(mask, (512, 512)), 8)
    assert small.shape == (1, 1, 64, 64)
    assert (small[0, 0].amax(0) == 1).sum() in (1, 64)
    assert int(small.sum()) == 64
    assert int((to_mask(mask.resize((1024, 1024), Image.Resampling.NEAREST), (512, 512)) > 0).sum()) >= 512
    assert int((to_mask(mask, (100, 100)) > 0).sum()) >= 100


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("seen", [True, False])
def test_blending_keeps_the_unmasked_area_and_releases_the_edge_at_low_noise(same, seen):
    """The mask covers all of the first latent, a part of the second and none of the third.

    A UNet that receives the mask keeps this mask.
    """
    schedule = Schedule.build("scaled_linear")
    mask = torch.zeros(1, 1, 4, 12)
    mask[..., :6] = 1
    x0, start, drawn = torch.full((1, 1, 1, 3), 2.0), torch.full((1, 1, 1, 3), 3.0), torch.full((1, 1, 1, 3), 5.0)
    last = schedule.level(0)
    places = inpaint_masks(mask, 4, seen)
    step = BlendedStep(lambda *_: torch.full((1, 1, 1, 3), 7.0), x0, start if same else None, places, last)
    for index in (900, 600, 400, 100, 0):
        level = schedule.level(index) if index else last
        got = step(None, x0, level, level, lambda: drawn)[0, 0, 0].tolist()
        given = level.alpha * 2 + level.sigma * (3 if same else 5) if index else 2.0
        edge = 7.0 if level.sigma <= level.alpha else given
        assert got == pytest.approx([7.0, edge, 7.0 if seen else given])
    assert schedule.level(400).sigma > schedule.level(400).alpha > schedule.level(100).sigma


def test_mask_edges_of_any_grey_are_inpainted(pipe):
    """The masks cover no latent completely: a thin line, a soft spot and the noise of a JPEG file."""
    (given,) = smooth_images(1)
    line, spot, jpeg = np.zeros((3, 32, 32), np.float32)
    line[7], spot[9, 9], jpeg[8:20, 8:20] = 1, 0.1, 0.98
    for mask, sampler in itertools.product((line, spot, jpeg), ("dpmpp_2m", "dpmpp_2m_sde")):
        how = {"mask_image": mask[None, :, :, None], "num_inference_steps": 3, "sampler": sampler, "output_type": "np"}
        made = pipe("a star", image=given, generator=generators(1), **how).images[0]
        changed = (made != np.asarray(given, np.float32) / 255).any(-1)
        assert not changed[mask == 0].any()
        assert changed[mask > 0].all()


def test_pil_images_are_converted_by_orientation_depth_and_alpha():
    """Images become upright, 16 bits are scaled, and transparent parts become white; repetition changes nothing."""
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    np.testing.assert_allclose(to_pixels(Image.fromarray(deep))[0, 0], np.rint(deep / 257) / 255, atol=1e-6)
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    assert to_pixels(clear)[0, :, 0, :2].T.tolist() == [[1, 1, 1], [1, 0, 0]]
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).save(file, "PNG", exif=exif)
    turned = Image.open(file)
    assert to_pixels(turned).shape == (1, 3, 6, 4)
    once = to_rgb(turned)
    once.info["note"] = "kept"
    assert to_rgb(once).info == {}
    assert once.info == {"note": "kept"}
    np.testing.assert_array_equal(np.asarray(to_rgb(once)), np.asarray(once))
    with pytest.raises(UserError, match="32 bits per pixel"):
        to_pixels(Image.new("F", (4, 4)))
    bytes_ = np.zeros((2, 2, 3), np.uint8)
    bytes_.flags.writeable = False
    assert to_pixels(bytes_).shape == (1, 3, 2, 2)


def test_transparent_parts_of_a_mask_are_black():
    layer = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (2, 2, 5, 4))
    found = to_mask(layer, (8, 8))
    assert found[0, 0, 2:4, 2:5].all()
    assert found.sum() == 6
    assert torch.equal(to_mask(found[0, 0].numpy(), (8, 8)), found)  # a plain array (h, w) is a mask too
    assert torch.equal(to_mask(found[0, 0] > 0, (8, 8)), found)


def test_masked_pixels_are_filled_from_their_surroundings():
    x = torch.rand(1, 3, 13, 22, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 13, 22)
    mask[..., 2:9, 4:20] = 1
    made = fill_masked_area(x, mask)
    assert torch.equal(torch.where(mask == 0, made, x), x)
    assert torch.equal(made, fill_masked_area(torch.where(mask > 0, -5.0, x), mask))  # nothing under the mask is used
    assert made.amin() >= x.amin()
    assert made.amax() <= x.amax()
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 13, 22)
    torch.testing.assert_close(fill_masked_area(torch.where(mask > 0, 0.0, red), mask), red)
    assert torch.isfinite(fill_masked_area(x, torch.ones_like(mask))).all()


def test_nearly_black_parts_of_a_mask_count_as_black(pipe):
    (given,), mask = smooth_images(1), np.asarray(box_mask())
    noisy = np.maximum(mask, np.random.default_rng(0).integers(0, 8, mask.shape)).astype(np.uint8)
    how = {"image": given, "num_inference_steps": 3}
    one, other = (
        np.asarray(pipe("a star", mask_image=Image.fromarray(m), generator=generators(1), **how).images[0])
        for m in (mask, noisy)
    )
    np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="mask_image is completely black"):
        pipe("a star", mask_image=Image.fromarray(noisy * (mask == 0)), **how)


def test_an_image_is_encoded_once_for_all_its_variations(monkeypatch):
    for inpaints, times in ((False, 1), (True, 2)):  # the image, and its unmasked area
        pipe, encoded = tiny_pipeline(inpaints=inpaints), []
        encode = pipe.autoencoder.encode
        monkeypatch.setattr(pipe.autoencoder, "encode", lambda x, f=encode, n=encoded: (n.append(len(x)), f(x))[1])
        how = {"mask_image": box_mask(), "strength": 0.5, "num_inference_steps": 2, "num_images_per_prompt": 5}
        made = pipe("a star", image=smooth_images(1), generator=generators(5), **how).images
        assert encoded == [1] * times
        single = pipe(
            "a star", image=smooth_images(1), generator=generators(5)[3:4], **how | {"num_images_per_prompt": 1}
        ).images
        assert np.abs(np.asarray(single[0], int) - np.asarray(made[3], int)).max() <= 1


def test_a_batch_equals_its_images_generated_separately(pipe):
    given = smooth_images(3)
    how = {"num_inference_steps": 3, "output_type": "np", "strength": 0.7}
    together = pipe("a star", image=given, generator=generators(3), **how).images
    for k in range(3):
        single = pipe("a star", image=given[k], generator=generators(3)[k : k + 1], **how).images
        assert np.abs(together[k] - single[0]).max() <= 1 / 255
    one_for_all = pipe(PROMPTS, image=given[0], generator=generators(2), **how).images
    assert (
        np.abs(one_for_all[0] - pipe(PROMPTS[0], image=given[0], generator=generators(1), **how).images[0]).max()
        <= 1 / 255
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"mask_image": box_mask()}, "need an input image: give image too"),
        ({"strength": 0.5}, "need an input image: give image too"),
        ({"image": smooth_images(1), "strength": 1.5}, "strength 1.5"),
        ({"image": smooth_images(3)}, "3 images but 2 prompts"),
        ({"image": [smooth_images(1)[0], *smooth_images(1, (40, 32))]}, "must have the same size"),
        ({"image": []}, "PIL images"),
        ({"image": ["cat.png"]}, "PIL images"),
        ({"image": torch.zeros(1, 4, 32, 32)}, r"shape \(1, 4, 32, 32\)"),
        ({"image": torch.full((1, 3, 32, 32), 2.0)}, "values from 2 to 2"),
        ({"image": torch.full((1, 3, 32, 32), float("nan"))}, "values from nan"),
        ({"image": smooth_images(1), "mask_image": Image.new("L", (32, 32))}, "mask_image is completely black"),
        ({"image": smooth_images(1), "width": 64}, "can't be used with an input image"),
    ],
)
def test_invalid_arguments_are_refused(pipe, how, message):
    with pytest.raises(UserError, match=message):
        pipe(PROMPTS, num_inference_steps=1, **how)

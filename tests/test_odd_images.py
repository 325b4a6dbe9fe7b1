"""Unusual images: a thousand damaged or odd files among a thousand good ones, colour profiles, and rectangles."""

import hashlib
import io
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from support.odd_images import bomb, encoded, write_odd_images
from train.data.images.decode import DamagedImage, image_size, load_image, to_tensor


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_a_thousand_odd_images_are_read_or_refused(tmp_path):
    groups = good, odd, damaged, _ = write_odd_images(tmp_path)
    assert [len(group) for group in groups] == [1000, 574, 355, 71]
    before = digests(tmp_path)
    read, refused = set(), {}
    for name in sorted(set.union(*groups)):
        try:
            image = load_image(tmp_path / name, name=name)
        except DamagedImage as error:
            refused[error.name] = error.reason
        else:
            assert image.mode == "RGB"
            assert image_size((tmp_path / name).read_bytes()) == image.size
            assert np.array_equal(image, load_image((tmp_path / name).read_bytes()))
            assert to_tensor(image, (16, 8)).shape == (3, 8, 16)
            read.add(name)
    assert good | odd <= read
    assert damaged <= set(refused)
    assert read.isdisjoint(refused)
    assert all(len(reason) > 10 and "\n" not in reason for reason in refused.values())
    assert digests(tmp_path) == before


def test_decompression_bombs_are_refused_quickly():
    data, _ = bomb(0, None)
    started = time.process_time()
    for read in (load_image, image_size):
        with pytest.raises(DamagedImage, match=r"accepted|exceeds limit"):
            read(data)
    assert time.process_time() - started < 1


# -- sizes from headers ---------------------------------------------------------------------------------------------


def test_sizes_are_read_from_headers(monkeypatch):
    pixels = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    files = {}
    for form in ("PNG", "JPEG", "WEBP", "TIFF"):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            files[form, orientation] = encoded(pixels, form, exif=exif)
    expected = {key: load_image(data).size for key, data in files.items()}
    assert set(expected.values()) == {(30, 20), (20, 30)}

    def load(*args):
        raise AssertionError("a header is enough")

    for form in ("PNG", "JPEG", "TIFF"):  # WebP's reader doesn't separate the header from the pixels
        monkeypatch.setattr(type(Image.open(io.BytesIO(files[form, 1]))), "load", load)
    assert {key: image_size(data) for key, data in files.items()} == expected
    with pytest.raises(DamagedImage, match=r"x\.png: not an image of an accepted format"):
        image_size(b"text", name="x.png")
    with pytest.raises(DamagedImage, match="30 × 20 pixels; up to 599 are accepted"):
        image_size(files["PNG", 1], max_pixels=599)


def test_files_of_several_jpegs_give_the_first():
    first, second = (Image.new("RGB", (32, 16), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(np.asarray(load_image(data)).astype(int) - (255, 0, 0)).max() <= 2
    assert image_size(data) == (32, 16)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif():
    data = encoded(Image.new("RGB", (32, 16), (200, 100, 50)), "AVIF", quality=100)
    assert np.abs(np.asarray(load_image(data)).astype(int) - (200, 100, 50)).max() <= 3
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (32, 16)), "AVIF", exif=exif)
    assert image_size(data) == load_image(data).size == (16, 32)


# -- colour profiles ------------------------------------------------------------------------------------------------


def fixed(*numbers: float) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Return an ICC profile, version 2."""
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = offset + len(body)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, kind, space, connection) + bytes(12) + b"acsp"
    head += bytes(28) + fixed(0.9642, 1.0, 0.8249)  # D50
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def matrix_profile(columns, gamma: float = 563 / 256) -> bytes:
    """Return the colour profile of a screen: its primaries' XYZ under D50, and its gamma."""
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)}
    for name, xyz in zip((b"r", b"g", b"b"), columns, strict=True):
        tags[name + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*xyz)
        tags[name + b"TRC"] = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return profile(b"RGB ", b"XYZ ", tags)


SRGB = np.array([(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)])
P3 = np.array([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)])


def in_srgb(pixels: np.ndarray, columns: np.ndarray, gamma: float = 563 / 256) -> np.ndarray:
    linear = np.clip((pixels / 255) ** gamma @ columns @ np.linalg.inv(SRGB), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_wide_gamut_colours_are_converted_to_srgb(form):
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (3, 4, 3)), np.ones((16, 16, 1), int)).astype(np.uint8)
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    data = encoded(Image.fromarray(pixels), form, icc_profile=matrix_profile(P3), **options)
    found = np.asarray(load_image(data)).astype(int)
    assert np.abs(found - in_srgb(pixels, P3))[8::16, 8::16].max() <= (4 if form == "JPEG" else 2)
    assert np.abs(found - pixels.astype(int)).max() > 20


def test_alpha_and_profile_together():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG", icc_profile=matrix_profile(P3))
    a = pixels[..., 3:] / 255
    expected = in_srgb(pixels[..., :3], P3) * a + np.array((0, 128, 255)) * (1 - a)
    assert np.abs(np.asarray(load_image(data, background=(0, 128, 255))) - expected).max() <= 3


def test_srgb_and_invalid_profiles_change_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cmyk_profile = profile(b"CMYK", b"Lab ", {})
    for icc in (srgb, b"", b"no profile", srgb[:200], bytes(500), cmyk_profile, matrix_profile(P3)[:300]):
        data = encoded(Image.fromarray(pixels), "PNG", icc_profile=icc)
        np.testing.assert_array_equal(np.asarray(load_image(data)), pixels)
    grey = encoded(Image.fromarray(pixels[..., 0]), "PNG", icc_profile=matrix_profile(P3))
    np.testing.assert_array_equal(np.asarray(load_image(grey))[..., 0], pixels[..., 0])


def test_cmyk_images_are_converted_by_their_profile():
    """Each ink of the press is a middle grey, L* = 50.2, which is 120 in sRGB. All four together are black."""
    ramp = bytes(range(256))
    corners = bytes([255, 128, 128] + [128, 128, 128] * 14 + [0, 128, 128])  # L*, a*, b* of 2⁴ mixtures
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + corners + ramp * 3
    icc = profile(b"CMYK", b"Lab ", {b"A2B0": lut, b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)})
    ink = np.zeros((32, 32, 4), np.uint8)
    ink[:, 16:, 3] = 255  # black
    for form in ("TIFF", "JPEG"):
        plain = encoded(Image.fromarray(ink, "CMYK"), form)
        assert np.asarray(load_image(plain))[16, [4, 28], 0].tolist() == [255, 0]
        found = np.asarray(load_image(encoded(Image.fromarray(ink, "CMYK"), form, icc_profile=icc))).astype(int)
        assert np.abs(found[16, [4, 28]] - np.array([[255], [120]])).max() <= 2


def test_flipped_bytes_in_profiles_do_no_harm():
    sound = matrix_profile(P3)
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    for trial in range(300):
        rng = np.random.default_rng(trial)
        raw = np.frombuffer(sound, np.uint8).copy()
        raw[rng.integers(0, len(raw), 3)] = rng.integers(0, 256, 3)
        assert load_image(encoded(image, "PNG", icc_profile=raw.tobytes())).size == (4, 4)


# -- rectangles -----------------------------------------------------------------------------------------------------

SIZES = [(30, 20), (20, 30), (37, 23), (7, 100), (101, 10), (64, 64), (1, 9), (300, 199)]
TARGETS = [(24, 16), (16, 24), (40, 8), (8, 40), (16, 16), (33, 17)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", SIZES)
def test_constant_images_stay_constant(size, target):
    for crop in ("center", "random"):
        pixels = to_tensor(Image.new("RGB", size, (10, 128, 250)), target, crop=crop, place=(0.99, 0.3))
        assert pixels.shape == (3, target[1], target[0])
        expected = torch.tensor([10, 128, 250])[:, None, None] / 127.5 - 1
        torch.testing.assert_close(pixels, expected.expand_as(pixels))


@pytest.mark.parametrize("target", TARGETS)
def test_a_rectangle_of_the_requested_size_is_unchanged(target):
    pixels = np.random.default_rng(0).integers(0, 256, (*target[::-1], 3), dtype=np.uint8)
    found = to_tensor(Image.fromarray(pixels), target)
    np.testing.assert_array_equal(((found.numpy() + 1) * 127.5).round().transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [(300, 199), (200, 400), (91, 77)])
def test_a_colour_gradient_is_resampled_from_the_centred_crop(size, target):
    """Horizontally and vertically, a pixel shows the place in the image that the centred crop gives it."""
    (w, h), (width, height) = size, target
    scale = min(w / width, h / height)  # pixels of the image per new pixel
    for axis, (length, new) in enumerate(((w, width), (h, height))):
        ramp = np.linspace(20, 235, length)
        values = np.rint(ramp)[None, :].repeat(h, 0) if axis == 0 else np.rint(ramp)[:, None].repeat(w, 1)
        found = to_tensor(Image.fromarray(values.astype(np.uint8)).convert("RGB"), target)[0]
        line = (found[height // 2] if axis == 0 else found[:, width // 2]).double().numpy() * 127.5 + 127.5
        where = length / 2 + (np.arange(new) + 0.5 - new / 2) * scale - 0.5
        expected = 20 + 215 * where / (length - 1)
        inner = slice(3, -3)  # at the crop's edge the filter has half its support
        step = 215 / (length - 1)
        assert np.abs(line - expected)[inner].max() <= 0.5 * step + 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [(300, 200), (64, 64), (40, 100)])
def test_mirroring_commutes_with_cropping(size, target):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    after = to_tensor(Image.fromarray(pixels), target, flip=True)
    torch.testing.assert_close(after, to_tensor(Image.fromarray(pixels), target).flip(2), rtol=0, atol=0)
    covered = -(-min(size[0] * target[1], size[1] * target[0]) // target[1])
    if (size[0] - covered) % 2 == 0:  # otherwise the crop's centre is off by half a pixel
        before = to_tensor(Image.fromarray(np.ascontiguousarray(pixels[:, ::-1])), target)
        assert float((before - after).abs().max()) <= 1.01 / 127.5


@pytest.mark.parametrize("size", SIZES)
def test_square_crops_start_at_whole_pixels(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    side = min(size)
    for left, top, place in (
        ((size[0] - side) // 2, (size[1] - side) // 2, None),
        (0, 0, (0.0, 0.0)),
        (size[0] - side, size[1] - side, (0.999999, 0.999999)),
    ):
        crop = Image.fromarray(pixels[top : top + side, left : left + side])
        expected = np.asarray(crop.resize((16, 16), Image.Resampling.LANCZOS))
        options = {"crop": "random", "place": place} if place else {}
        found = to_tensor(Image.fromarray(pixels), 16, **options)
        torch.testing.assert_close(found, to_tensor(Image.fromarray(pixels), (16, 16), **options), rtol=0, atol=0)
        np.testing.assert_array_equal(((found.numpy() + 1) * 127.5).round().transpose(1, 2, 0), expected)


def test_random_crops_reach_both_edges():
    pixels = np.zeros((20, 90, 3), np.uint8)
    pixels[:, :5], pixels[:, -5:] = 255, 255
    image = Image.fromarray(pixels)
    means = [to_tensor(image, (30, 20), crop="random", place=(u, 0.5))[0].mean(0) for u in (0.0, 0.5, 0.999999)]
    assert means[0][:5].min() == means[2][-5:].min() == 1
    assert means[0][-5:].max() == means[2][:5].max() == means[1].max() == -1

"""Files become the 8-bit images that a viewer would show, or are refused with a reason."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from uvc.training.images import Unreadable, endings, read_picture

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9)).astype(np.uint16)


def stored(image, ending="PNG", **options):
    file = io.BytesIO()
    image.save(file, ending, **options)
    return io.BytesIO(file.getvalue())


def pixels(file, mode="RGB"):
    return np.asarray(read_picture(file, mode).image).astype(int)


@pytest.mark.parametrize("ending", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_plain_colours_come_back_as_they_are(ending):
    options = {"lossless": True} if ending == "WEBP" else {}
    assert np.array_equal(pixels(stored(Image.fromarray(RGB), ending, **options)), RGB)


@pytest.mark.parametrize("ending", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_16_bit_grey_is_scaled_and_not_clipped(ending, mode):
    wanted = np.rint(DEEP / 257).astype(int)
    found = pixels(stored(Image.fromarray(DEEP), ending), mode)
    assert np.array_equal(found, wanted if mode == "L" else np.stack([wanted] * 3, -1))
    remark = read_picture(stored(Image.fromarray(DEEP), ending), mode).remark
    assert remark == "have 16 bits per value, scaled to 8"


def test_big_endian_16_bit_tiff_is_scaled_too():
    file = io.BytesIO()
    Image.frombytes("I;16B", (9, 6), DEEP.astype(">u2").tobytes()).save(file, "TIFF")
    assert np.array_equal(pixels(io.BytesIO(file.getvalue()), "L"), np.rint(DEEP / 257))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_unknown_range_are_refused(dtype):
    with pytest.raises(Unreadable, match="of unknown range; store them in 8 or 16 bits"):
        read_picture(stored(Image.fromarray(DEEP.astype(dtype)), "TIFF"), "RGB")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_black_and_white_is_0_and_255(mode):
    bits = Image.fromarray(GREY > 127)
    assert np.array_equal(pixels(stored(bits), mode).reshape(6, 9, -1)[..., 0], 255 * (GREY > 127))


def test_a_palette_gives_its_colours():
    palette = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE, colors=54)
    assert np.array_equal(pixels(stored(palette)), np.asarray(palette.convert("RGB")).astype(int))


def test_cmyk_becomes_rgb():
    image = Image.fromarray(RGB).convert("CMYK")
    assert np.array_equal(pixels(stored(image, "TIFF")), RGB)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("hidden", [0, 77, 255])
def test_what_lies_under_transparent_pixels_is_not_seen(mode, hidden):
    colours = RGB.copy() if mode == "RGBA" else GREY[..., None].copy()
    alpha = np.full((6, 9, 1), 255, np.uint8)
    alpha[:3] = 0
    colours[:3] = hidden
    image = Image.fromarray(np.concatenate([colours, alpha], -1), mode)
    found = pixels(stored(image))
    assert (found[:3] == 255).all()
    assert np.array_equal(found[3:], np.broadcast_to(colours[3:], (3, 9, 3)))


def test_a_transparent_colour_of_a_palette_is_white():
    image = Image.fromarray(RNG.integers(0, 3, (6, 9), dtype=np.uint8), "P")
    image.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    found = pixels(stored(image, transparency=0))
    assert (found[np.asarray(image) == 0] == 255).all()
    assert (found[np.asarray(image) == 1] == (10, 20, 30)).all()


@pytest.mark.parametrize("ending", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_image_stands_upright_as_exif_says(ending):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    image = Image.fromarray(np.repeat(np.repeat(GREY[:3, :2], 16, 0), 16, 1)).convert("RGB")
    turned = np.asarray(image.rotate(-90, expand=True)).astype(int)
    found = pixels(stored(image, ending, exif=exif))
    assert found.shape == turned.shape and abs(found - turned).mean() < 12


@pytest.mark.parametrize("ending", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_used_and_it_is_said(ending):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    file = stored(frames[0], ending, save_all=True, append_images=frames[1:])
    picture = read_picture(file, "RGB")
    assert np.allclose(np.asarray(picture.image), (255, 0, 0), atol=3)
    assert picture.remark == "have more than one frame, of which the first is used"


@pytest.mark.parametrize("ending", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
def test_a_file_that_is_cut_short_is_refused(ending, part):
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = stored(noise, ending).getvalue()
    with pytest.raises(Unreadable) as caught:
        read_picture(io.BytesIO(data[: int(part * len(data))]), "RGB")
    assert str(caught.value) and "\n" not in str(caught.value)


def test_an_image_too_large_to_be_one_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings(), pytest.raises(Unreadable, match="decompression bomb"):
        warnings.simplefilter("ignore")
        read_picture(stored(Image.fromarray(RGB)), "RGB")


def test_endings_are_those_of_pictures():
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"} <= endings()
    assert not {".txt", ".npy", ".h5", ".eps", ".mpg", ".pdf", ".svg"} & endings()

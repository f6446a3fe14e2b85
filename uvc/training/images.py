"""Files to 8-bit images: 16 bits scaled, palettes resolved, transparency over white, upright by EXIF."""

from __future__ import annotations

from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

# Read by libraries or programs that Pillow has not, or no pictures.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
ALPHA = {"RGBA", "RGBa", "LA", "La", "PA"}


class Unreadable(ValueError):
    """A file that is no whole image, or one whose values have no known range; the message says why."""


class Picture(NamedTuple):
    """image: 8-bit, of the asked mode. remark: what of the file was not used as it stands, or None."""

    image: Image.Image
    remark: str | None


def endings() -> set[str]:
    """Suffixes, lower case with the dot, of the files that Pillow can read."""
    Image.init()
    formats = Image.OPEN.keys() - NOT_READ
    return {ending.lower() for ending, name in Image.registered_extensions().items() if name in formats}


def read_picture(file: str | IO[bytes] | Image.Image, mode: str) -> Picture:
    """The first frame of an image file, in "RGB" or "L"; ``Unreadable`` with the reason in one line.

    file: a path, an open file, or an image that something else has opened.
    """
    try:
        image = file if isinstance(file, Image.Image) else Image.open(file)
        frames = getattr(image, "n_frames", 1) if getattr(image, "is_animated", False) else 1
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return Picture(to_8_bit(image, mode), _remark(image.mode, frames))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers answer broken files with whatever they run into
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None


def to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    """A loaded image in "RGB" or "L", by what its values mean and not by what fits into a byte."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Older versions of Pillow open 16-bit PNG as 32-bit integers.
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(values * (255 / 65535)).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise Unreadable(f"its values are {kind} of unknown range; store them in 8 or 16 bits")
    if image.mode in ALPHA or "transparency" in image.info:
        # What lies under transparent pixels is whatever the program that wrote them left there.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _remark(mode: str, frames: int) -> str | None:
    if frames > 1:
        return "have more than one frame, of which the first is used"
    if mode.startswith("I"):
        return "have 16 bits per value, scaled to 8"
    return None

"""How images are to be seen: their size and their pixels, the same in every room."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow
from PIL import ExifTags, Image, ImageOps


DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged or closed files: whatever the parser of the format stumbles over."""


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """
    Width and height of an image, turned as its EXIF orientation says.

    Args:
        image (`PIL.Image.Image`):
            The image. Of most formats the header is read, not the pixels.

    Raises:
        ValueError: If the image cannot be read, since it is closed or its file damaged.
    """
    width, height = image.size
    # Orientations 5 to 8 of the EXIF standard lay the image on its side.
    if _orientation(image) >= 5:
        return height, width
    return width, height


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """
    Any PIL image as plain RGB pixels, as it is to be seen: turned as its EXIF orientation says, transparent pixels on
    white, of an animation the frame that is selected. Gray levels of 16 bits are scaled to 8 (Pillow would clip them).
    What it returns is not changed by a second call, and is the image itself where it is all that already, in memory.

    Args:
        image (`PIL.Image.Image`):
            Image of any mode but floating point and Lab. Mode `"I"` is what Pillow makes of some files of 16 bits, so its
            pixels must be from 0 to 65,535.

    Raises:
        ValueError: If the image cannot be read, since it is closed or its file damaged, or its pixels have no defined
            range: floating-point numbers, integers of more than 16 bits, Lab.
    """
    rgb = _as_rgb(image)
    # The image of a file is bound to it: whoever saves it would get its format, or its path, in place of pixels.
    return rgb.copy() if rgb is image and type(image) is not Image.Image else rgb


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """
    The pixels of [`convert_to_rgb`] `(height, width, 3)`, uint8, not to be written to. Plain images are read without
    copies of their own, each of which may take as long as cutting a small image into views.

    Args:
        image (`PIL.Image.Image`):
            As for [`convert_to_rgb`].

    Raises:
        ValueError: As [`convert_to_rgb`].
    """
    return np.asarray(_as_rgb(image))


def stored_pixels(image: Image.Image) -> np.ndarray:
    """
    The pixels of [`convert_to_rgb`] as they lie in memory, `(height, width, 4)`, uint8, not to be written to: the fourth value
    of a pixel means nothing. Nothing is copied, except of images of more than 16 MB, which Pillow keeps in pieces, and by a
    Pillow before 11.2.1. To be used while the image is there.

    Args:
        image (`PIL.Image.Image`):
            As for [`convert_to_rgb`].

    Raises:
        ValueError: As [`convert_to_rgb`].
    """
    rgb = _as_rgb(image)
    if hasattr(rgb, "__arrow_c_array__"):
        try:
            values = pyarrow.array(rgb).flatten()
            return values.to_numpy(zero_copy_only=True).reshape(rgb.height, rgb.width, 4)
        except ValueError:  # in pieces
            pass
    return np.asarray(rgb.convert("RGBX"))


def _as_rgb(image: Image.Image) -> Image.Image:
    """As [`convert_to_rgb`], but an image that is plain RGB already is returned even if it is a file's."""
    with _reading():
        image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scale_16_bits(image).convert("RGB")
    if image.mode in ("F", "LAB"):
        raise ValueError(f"its pixels have the mode {image.mode}, which has no one meaning in RGB")
    if image.has_transparency_data:
        # What a transparent pixel hides is arbitrary, often black: the model is shown what a white page would show.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """What is to be done to see an image upright, from 1 (nothing) to 8."""
    with _reading():  # some formats keep it behind the pixels
        return image.getexif().get(ExifTags.Base.Orientation, 1)


@contextmanager
def _reading() -> Iterator[None]:
    """Says of whatever Pillow raises that an image cannot be read."""
    try:
        yield
    except DECODER_ERRORS as error:
        # A closed image has no file any more, which not every version of Pillow says.
        is_closed = isinstance(error, AttributeError) or not str(error)
        reason = "Operation on closed image" if is_closed else " ".join(str(error).split())
        raise ValueError(f"it cannot be read ({reason}): give an open image, of an undamaged file") from error


def _scale_16_bits(image: Image.Image) -> Image.Image:
    """Gray levels from 0 to 65,535 as the nearest of 256; those of the transparent level, if there is one, as white."""
    levels = np.asarray(image).astype(np.int32)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its gray levels run from {levels.min()} to {levels.max()}, which is more than 16 bits")
    scaled = (levels + 128) // 257
    if "transparency" in image.info:
        scaled[levels == image.info["transparency"]] = 255
    return Image.fromarray(scaled.astype(np.uint8))

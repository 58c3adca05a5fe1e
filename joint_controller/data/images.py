"""From an encoded image to RGB pixels, or to a reason why there are none."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..images import DECODER_ERRORS, convert_to_rgb


MIN_IMAGE_SIDE = 2
"""Fewest pixels of a side. A line of pixels, or a single one, is a placeholder or a tracking pixel: nothing can be asked
about it."""

MAX_IMAGE_PIXELS = 89_478_485
"""Most pixels: 256 MiB as RGB, where Pillow begins to suspect a decompression bomb. The largest scans of documents in use
(A3 at 600 dots an inch) have 70 million."""


class ImageError(ValueError):
    """An image that cannot be used. The message is the cause alone: who catches it knows where the image stood."""


def decode_image(encoded: Mapping[str, Any]) -> Image.Image:
    """
    Decodes an image as all of this package sees it: RGB, turned as its EXIF orientation says, transparent pixels on white,
    16 bits scaled to 8, CMYK and palettes converted, of an animation the first frame
    ([`~joint_controller.images.convert_to_rgb`]).

    Args:
        encoded (`dict`):
            `bytes`, the encoded image, or, where they are `None`, `path`, its file: what a column of type
            `datasets.Image(decode=False)` holds.

    Raises:
        ImageError: If there is no image, its file is missing or damaged, a side has fewer than `MIN_IMAGE_SIDE` pixels,
            it has more than `MAX_IMAGE_PIXELS`, or its pixels have no defined range. Sizes are those of the header: too
            large an image is refused before its pixels take any memory.
    """
    with open_image(encoded) as image:
        return _read_pixels(image)


def check_image(encoded: Mapping[str, Any]) -> None:
    """
    Raises what [`decode_image`] would raise, in less time: a JPEG file is read to its end, but decoded at an eighth of its
    size.
    """
    with open_image(encoded) as image:
        _read_pixels(image, reduction=8)


def open_image(encoded: Mapping[str, Any] | None) -> Image.Image:
    """Reads the header of an image (encoded as for [`decode_image`]), and refuses by it. The caller closes the image."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise ImageError("there is no image")
    try:
        image = Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"]))
    except Image.DecompressionBombError as error:
        raise ImageError(f"it has more than {MAX_IMAGE_PIXELS:,} pixels ({error})") from error
    except FileNotFoundError as error:
        raise ImageError(f"its file '{encoded['path']}' does not exist") from error
    except DECODER_ERRORS as error:
        raise ImageError(f"the image cannot be decoded ({_reason(error)})") from error
    width, height = image.size
    if min(width, height) < MIN_IMAGE_SIDE:
        raise ImageError(f"it has {width}x{height} pixels, and a side must have {MIN_IMAGE_SIDE} or more")
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageError(f"it has {width}x{height} pixels, which is more than {MAX_IMAGE_PIXELS:,}")
    return image


def _read_pixels(image: Image.Image, reduction: int = 1) -> Image.Image:
    try:
        if reduction > 1:
            # Pillow does this for JPEG, and nothing for other formats.
            image.draft(image.mode, (max(1, image.width // reduction), max(1, image.height // reduction)))
        image.load()
        return convert_to_rgb(image)
    except DECODER_ERRORS as error:
        raise ImageError(f"the image cannot be decoded ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return "no known format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())

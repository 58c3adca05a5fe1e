"""How images are to be seen: their size and their pixels, the same in every room."""

import numpy as np
from PIL import Image, ImageOps


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """
    Width and height of an image, turned as its EXIF orientation says.

    Args:
        image (`PIL.Image.Image`):
            The image. Of most formats the header is read, not the pixels.
    """
    width, height = image.size
    # Orientations 5 to 8 of the EXIF standard lay the image on its side.
    if image.getexif().get(0x0112, 1) >= 5:
        return height, width
    return width, height


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """
    Any PIL image as plain RGB pixels, as it is to be seen: turned as its EXIF orientation says, transparent pixels on
    white, of an animation the frame that is selected. Gray levels of 16 bits are scaled to 8 (Pillow would clip them).
    What it returns is not changed by a second call.

    Args:
        image (`PIL.Image.Image`):
            Image of any mode but floating point and Lab. Mode `"I"` is what Pillow makes of some files of 16 bits, so its
            pixels must be from 0 to 65,535.

    Raises:
        ValueError: If the pixels have no defined range: floating-point numbers, integers of more than 16 bits, Lab.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scale_16_bits(image).convert("RGB")
    if image.mode in ("F", "LAB"):
        raise ValueError(f"its pixels have the mode {image.mode}, which has no one meaning in RGB")
    if image.has_transparency_data:
        # What a transparent pixel hides is arbitrary, often black: the model is shown what a white page would show.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scale_16_bits(image: Image.Image) -> Image.Image:
    """Gray levels from 0 to 65,535 as the nearest of 256; those of the transparent level, if there is one, as white."""
    levels = np.asarray(image).astype(np.int32)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its gray levels run from {levels.min()} to {levels.max()}, which is more than 16 bits")
    scaled = (levels + 128) // 257
    if "transparency" in image.info:
        scaled[levels == image.info["transparency"]] = 255
    return Image.fromarray(scaled.astype(np.uint8))

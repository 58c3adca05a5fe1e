"""What is done to images in memory, and what is not. Modes and orientations are tested with the files that have them."""

import io

import numpy as np
import pytest
from PIL import Image

from joint_controller.images import convert_to_rgb, oriented_size, rgb_pixels


PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)


def file_of(image: Image.Image, format: str, num_bytes: int | None = None, **kwargs) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return Image.open(io.BytesIO(buffer.getvalue()[:num_bytes]))


def test_plain_images_are_not_copied():
    image = Image.fromarray(PIXELS)
    assert convert_to_rgb(image) is image
    assert (rgb_pixels(image) == PIXELS).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_the_image_of_a_file_becomes_one_in_memory(format):
    image = file_of(Image.fromarray(PIXELS), format)
    assert image.format == format
    plain = convert_to_rgb(image)
    assert type(plain) is Image.Image and plain.format is None
    assert (np.asarray(plain) == PIXELS).all() and (rgb_pixels(image) == PIXELS).all()
    plain.putpixel((0, 0), (1, 2, 3))
    assert (rgb_pixels(image) == PIXELS).all()


def test_an_orientation_turns_pixels_and_size_alike():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it"
    image = file_of(Image.fromarray(PIXELS), "PNG", exif=exif)
    assert image.size == (50, 30) and oriented_size(image) == (30, 50)
    assert (rgb_pixels(image) == np.rot90(PIXELS, -1)).all()
    assert convert_to_rgb(image).size == (30, 50)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP"])
def test_half_a_file_is_refused_in_one_line(format):
    for read in (convert_to_rgb, rgb_pixels):
        with pytest.raises(ValueError, match=r"^it cannot be read \(.+\): give an open image, of an undamaged file$"):
            read(file_of(Image.fromarray(PIXELS), format, num_bytes=1000))


@pytest.mark.parametrize("format", [None, "PNG", "JPEG", "TIFF"])
def test_a_closed_image_is_refused_in_one_line(format):
    image = Image.fromarray(PIXELS)
    if format is not None:
        image = file_of(image, format)
    image.close()
    for read in (convert_to_rgb, rgb_pixels):
        with pytest.raises(ValueError, match=r"^it cannot be read \(Operation on closed image\)"):
            read(image)
    if format == "TIFF":  # reads its orientation from its file
        with pytest.raises(ValueError, match=r"^it cannot be read \(Operation on closed image\)"):
            oriented_size(image)

"""From files of all kinds to RGB pixels, by pixel values; and what is refused, before its pixels take memory."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from joint_controller.data import ImageError, decode_image
from joint_controller.data.images import MAX_IMAGE_PIXELS, check_image
from joint_controller.images import convert_to_rgb
from joint_controller.molmo.image_processing_molmo import MolmoImageProcessor


def encode(image: Image.Image, format: str = "PNG", **kwargs) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **kwargs)
    return {"bytes": buffer.getvalue(), "path": None}


def png_header(width: int, height: int) -> dict:
    """A PNG file of a size, that holds one byte of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return {"bytes": b"\x89PNG\r\n\x1a\n" + data, "path": None}


def pixels(encoded: dict) -> np.ndarray:
    check_image(encoded)
    image = decode_image(encoded)
    assert image.mode == "RGB" and not image.has_transparency_data and image.getexif().get(0x0112, 1) == 1
    values = np.asarray(image)
    # Whoever converts again, as the image processor does, changes nothing.
    assert (np.asarray(convert_to_rgb(image)) == values).all()
    return values


def gray_16_bits(levels) -> Image.Image:
    return Image.fromarray(np.array([levels, levels], dtype=np.uint16))


# ---- what is converted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled_to_8(format):
    levels = [0, 128, 129, 257, 30000, 65406, 65407, 65535]  # 257 to a level of 8 bits, boundaries half-way
    expected = [0, 0, 1, 1, 117, 254, 255, 255]
    assert pixels(encode(gray_16_bits(levels), format))[0].tolist() == [[level] * 3 for level in expected]


def test_a_transparent_level_of_16_bits_becomes_white():
    assert pixels(encode(gray_16_bits([0, 30000]), transparency=30000))[0, :, 0].tolist() == [0, 255]


def test_more_than_16_bits_are_refused():
    for array, message in (
        (np.array([[0, 70000]] * 2, dtype=np.int32), "from 0 to 70000, which is more than 16 bits"),
        (np.array([[0.0, 0.5]] * 2, dtype=np.float32), "mode F"),
    ):
        with pytest.raises(ImageError, match=message):
            decode_image(encode(Image.fromarray(array), "TIFF"))
        with pytest.raises(ImageError, match=message):
            check_image(encode(Image.fromarray(array), "TIFF"))


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 51), (244, 224, 204)),  # a fifth of the color, four fifths of white
        ("LA", (100, 51), (224, 224, 224)),
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
    ],
)
def test_alpha_is_composed_on_white(mode, color, expected):
    assert pixels(encode(Image.new(mode, (4, 4), color)))[0, 0].tolist() == list(expected)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palettes_are_looked_up_and_their_transparent_color_becomes_white(format):
    image = Image.new("P", (4, 4), 2)
    image.putpalette([9, 9, 9, 10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    assert pixels(encode(image, format))[0, :2].tolist() == [[10, 20, 30], [200, 100, 50]]
    assert pixels(encode(image, format, transparency=2))[0, :2].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_partly_transparent_palette():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([200, 100, 0])
    assert pixels(encode(image, transparency=bytes([51])))[0, 0].tolist() == [244, 224, 204]


def test_a_transparent_color_without_alpha_becomes_white():
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    image.putpixel((0, 0), (4, 5, 6))
    assert pixels(encode(image, transparency=(1, 2, 3)))[0].tolist() == [[4, 5, 6], [255, 255, 255]]


def test_cmyk():
    # Ink c and black k leave (255 - c) (255 - k) / 255 of red.
    image = Image.new("CMYK", (16, 16), (100, 20, 200, 50))
    assert pixels(encode(image, "TIFF"))[0, 0].tolist() == [125, 189, 44]
    # Pillow writes CMYK as Adobe does, inverted and marked: 255 stands for no ink.
    jpeg = encode(image, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in jpeg["bytes"]
    assert np.abs(pixels(jpeg).astype(int) - [125, 189, 44]).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(format, orientation):
    corners = np.zeros((16, 32, 3), dtype=np.uint8)
    corners[:8, :16] = (255, 0, 0)
    corners[:8, 16:] = (0, 255, 0)
    corners[8:, :16] = (0, 0, 255)
    # How the camera held the picture: the inverse of what the EXIF standard says is to be done to see it.
    stored = {
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.transpose(1, 0, 2),
        6: np.rot90(corners, 1),
        7: corners[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(corners, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if format == "WEBP" else {}
    encoded = encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **lossless)
    found = pixels(encoded)
    assert found.shape == corners.shape
    assert np.abs(found.astype(int) - corners)[4:12:7, 4:28:23].max() < 20

    processor = MolmoImageProcessor(
        (32, 32), 4, image_token_length_h=4, image_token_length_w=4, max_crops=2, overlap_margins=(2, 0)
    )
    seen = processor(decode_image(encoded), return_tensors="np")
    directly = processor(Image.open(io.BytesIO(encoded["bytes"])), return_tensors="np")
    assert (seen["pixel_values"] == directly["pixel_values"]).all()


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_seen(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    kwargs = {"lossless": True} if format == "WEBP" else {}
    encoded = encode(frames[0], format, save_all=True, append_images=frames[1:], **kwargs)
    assert Image.open(io.BytesIO(encoded["bytes"])).n_frames == 3
    assert (pixels(encoded) == (250, 0, 0)).all()


@pytest.mark.parametrize(
    "encoded",
    [
        pytest.param(
            encode(gray_16_bits(range(0, 65536, 2048)).resize((32, 32), Image.Resampling.NEAREST)), id="16-bit"
        ),
        pytest.param(encode(Image.new("RGBA", (20, 12), (200, 100, 0, 51))), id="alpha"),
        pytest.param(encode(Image.new("CMYK", (20, 12), (100, 20, 200, 50)), "JPEG"), id="cmyk"),
        pytest.param(encode(Image.new("P", (20, 12), 3), "GIF", transparency=3), id="palette"),
    ],
)
def test_the_image_processor_sees_the_same_in_a_file_that_others_opened(encoded):
    processor = MolmoImageProcessor(
        (32, 32), 4, image_token_length_h=4, image_token_length_w=4, max_crops=2, overlap_margins=(2, 0)
    )
    seen = processor(decode_image(encoded), return_tensors="np")
    directly = processor(Image.open(io.BytesIO(encoded["bytes"])), return_tensors="np")
    assert (seen["pixel_values"] == directly["pixel_values"]).all()
    assert len(np.unique(seen["pixel_values"])) > 1


def test_files_are_read_by_their_path(tmp_path):
    Image.new("RGB", (3, 5), (1, 2, 3)).save(tmp_path / "image.png")
    encoded = {"bytes": None, "path": str(tmp_path / "image.png")}
    assert pixels(encoded).shape == (5, 3, 3)


# ---- what is refused ------------------------------------------------------------------------------------------------

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        pytest.param(None, "there is no image", id="null"),
        pytest.param({"bytes": None, "path": None}, "there is no image", id="nothing"),
        pytest.param({"bytes": None, "path": "/no/such.png"}, "file '/no/such.png' does not exist", id="missing"),
        pytest.param({"bytes": b"", "path": None}, "cannot be decoded .no known format", id="empty"),
        pytest.param({"bytes": b"<html>404</html>", "path": "a.jpg"}, "no known format", id="foreign"),
        pytest.param(encode(Image.new("RGB", (1, 1))), "it has 1x1 pixels, and a side must have 2", id="1x1"),
        pytest.param(encode(Image.new("RGB", (300, 1))), "it has 300x1 pixels", id="line"),
        pytest.param(png_header(20_000, 20_000), "more than 89,478,485", id="20,000x20,000"),
        pytest.param(png_header(12_000, 8_000), "12000x8000 pixels, which is more than 89,478,485", id="too-large"),
        pytest.param(png_header(50, 50), "cannot be decoded", id="no-pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unusable_images_are_refused(encoded, message):
    for function in (decode_image, check_image):
        with pytest.raises(ImageError, match=message):
            function(encoded)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused(format):
    whole = encode(NOISE, format)["bytes"]
    decode_image({"bytes": whole, "path": None})
    for share in (0.1, 0.6, 0.9):
        for function in (decode_image, check_image):
            with pytest.raises(ImageError, match="cannot be decoded"):
                function({"bytes": whole[: int(share * len(whole))], "path": None})


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged metadata
def test_damaged_files_are_images_or_refused_and_the_check_says_which():
    generator = np.random.default_rng(1)
    refused = 0
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = encode(NOISE, format)["bytes"]
        for _ in range(60):
            damaged = np.frombuffer(whole, dtype=np.uint8).copy()
            places = generator.integers(0, generator.choice([30, len(whole)]), 3)
            damaged[places] = generator.integers(0, 256, 3)
            verdicts = []
            for function in (decode_image, check_image):
                try:
                    function({"bytes": damaged.tobytes(), "path": None})
                    verdicts.append("good")
                except ImageError:
                    verdicts.append("bad")
            assert verdicts[0] == verdicts[1]
            refused += verdicts[0] == "bad"
    assert 60 < refused < 300


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_large_an_image_takes_no_memory():
    # 10,000 × 10,000 of one color: 100 kB in the file, 300 MB decoded, and small enough for Pillow to decode it.
    side = 10_000
    compressor = zlib.compressobj(1)
    body = b"".join(compressor.compress(bytes(1 + 3 * side)) for _ in range(side)) + compressor.flush()
    data = png_header(side, side)["bytes"].replace(zlib.compress(b"\0"), body)
    assert side * side > MAX_IMAGE_PIXELS
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="more than"):
        decode_image({"bytes": data, "path": None})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB

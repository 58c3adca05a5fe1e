import io
import itertools
import json
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from joint_controller.molmo.image_processing_molmo import MolmoImageProcessor
from joint_controller.molmo.knob_space import DEFAULT_TIER_CROPS
from joint_controller.molmo.view_cutting import cut_by_interpolation


SMALL = {
    "base_image_input_size": [32, 32],
    "image_patch_size": 4,
    "image_token_length_h": 4,
    "image_token_length_w": 4,
    "max_crops": 9,
}


def small_processor(**changes) -> MolmoImageProcessor:
    return MolmoImageProcessor(**{**SMALL, "overlap_margins": [2, 0], **changes})


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reference_pixel_values(
    processor: MolmoImageProcessor, image: Image.Image, tiling: tuple[int, int]
) -> torch.Tensor:
    """Step by step: resize planes of pixels, normalise them, put them on a black canvas, copy out view by view."""
    side, patch = processor.base_image_input_size[0], processor.image_patch_size
    window = side - sum(processor.overlap_margins) * patch
    planes = torch.tensor(np.array(image)).permute(2, 0, 1).float() / 255
    if processor.do_normalize:
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    else:
        mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    views = []
    for rows, columns in ((1, 1), tiling):
        canvas_size = np.array([(rows - 1) * window + side, (columns - 1) * window + side], dtype=np.float32)
        size = np.array([image.height, image.width], dtype=np.float32)
        height, width = np.maximum((size * (canvas_size / size).min()).astype(int), 1).tolist()
        resized = F.interpolate(planes[None], size=(height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)
        canvas = ((0 - mean) / std).repeat(1, *canvas_size.astype(int))
        top, left = ((total - length) // 2 for total, length in zip(canvas.shape[1:], (height, width), strict=True))
        canvas[:, top : top + height, left : left + width] = (resized - mean) / std
        for row, column in itertools.product(range(rows), range(columns)):
            view = canvas[:, row * window : row * window + side, column * window : column * window + side]
            patches = view.unfold(1, patch, patch).unfold(2, patch, patch)  # (3, rows, columns, patch, patch)
            views.append(patches.permute(1, 2, 3, 4, 0).reshape(-1, 3 * patch**2))
    return torch.stack(views)


def golden_differences(outputs: dict, golden: dict) -> list[str]:
    """Names of the golden arrays that the outputs of one image disagree with."""
    pixels = outputs["pixel_values"][0].numpy()
    if pixels.shape != tuple(golden["crops_shape"]):
        return ["crops_shape"]
    close = {
        "crops_sample": (pixels[:, ::48, ::49], golden["crops_sample"]),
        "crops_mean": (pixels.mean(axis=(1, 2), dtype=np.float64), golden["crops_mean"]),
        "image_masks": (outputs["image_masks"][0].numpy(), golden["image_masks"]),
        "image_input_idx": (outputs["image_input_idx"][0].numpy(), golden["image_input_idx"]),
    }
    return [
        name
        for name, (ours, theirs) in close.items()
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=0, atol=1e-4)
    ]


@pytest.fixture(scope="module")
def golden_cases(shared_dir):
    folder = shared_dir / "molmo" / "golden" / "preprocess"
    cases = json.loads((folder / "index.json").read_text())
    return [(case, Image.open(folder / case["image"]), dict(np.load(folder / case["file"]))) for case in cases]


@pytest.fixture(scope="module")
def published(shared_dir):
    return MolmoImageProcessor.from_pretrained(shared_dir / "molmo" / "molmoe-1b")


def test_golden_views_masks_and_positions(published, golden_cases):
    assert len(golden_cases) == 16
    for case, image, golden in golden_cases:
        outputs = published(image, max_crops=case["max_crops"])
        assert golden_differences(outputs, golden) == [], case["file"]
        assert math.prod(outputs["tilings"][0].tolist()) == case["num_crops"]
        assert published.count_image_tokens(outputs["tilings"][0].tolist()) == case["num_image_tokens"]


def test_golden_comparison_notices_every_broken_output(published, golden_cases):
    case, image, golden = next(item for item in golden_cases if item[0]["num_crops"] == 6)
    broken = published(image, max_crops=case["max_crops"])
    broken["image_masks"][0, 0] = 1
    broken["pixel_values"][0, 3] += 2e-4
    broken["image_input_idx"][0, 2, 70] += 1
    assert golden_differences(broken, golden) == ["crops_sample", "crops_mean", "image_masks", "image_input_idx"]
    broken = published(image, max_crops=1)
    assert golden_differences(broken, golden) == ["crops_shape"]


def test_published_settings_are_the_defaults(published):
    assert published.to_dict() == MolmoImageProcessor().to_dict()


def test_save_and_reload_gives_the_same_outputs(tmp_path):
    processor = small_processor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    processor.save_pretrained(tmp_path)
    reloaded = MolmoImageProcessor.from_pretrained(tmp_path)
    assert reloaded.to_dict() == processor.to_dict()
    image = noise_image(50, 40)
    for name, values in processor(image).items():
        assert torch.equal(values, reloaded(image)[name]), name


@pytest.mark.parametrize("margins", [[2, 0], [0, 2], [0, 0], [2, 2]])
@pytest.mark.parametrize("tiling", [(1, 1), (2, 2), (3, 3), (1, 4), (5, 1), (2, 3)])
def test_every_token_of_the_tiled_image_comes_from_one_crop(margins, tiling):
    processor = small_processor(overlap_margins=margins)
    positions = processor.image_input_idx(tiling)
    assert positions.shape == (1 + math.prod(tiling), 16)
    # Independent of the implementation: the token rows of both grids, column and border tokens apart.
    expected, start = [], 0
    for rows, columns in processor.token_grids(tiling):
        grid = [[start + 1 + row * (columns + 1) + column for column in range(columns)] for row in range(rows)]
        expected += list(itertools.chain.from_iterable(grid))
        start += rows * (columns + 1) + 2
    assert sorted(positions[positions >= 0].tolist()) == expected
    assert set(positions[positions < 0].tolist()) <= {-100}
    assert start == processor.count_image_tokens(tiling)


@pytest.mark.parametrize("margins", [[2, 0], [2, 2]])
def test_a_token_stands_where_its_pixels_are(margins):
    """Each pixel's value is its own pooled patch: a crop's pooled patch must carry the token of that place."""
    processor = small_processor(overlap_margins=margins, do_normalize=False, max_crops=6)
    tiling = (2, 3)
    side = 8 - sum(margins)
    rows, columns = ((count * side + sum(margins)) // 2 for count in tiling)
    cells = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns)
    image = Image.fromarray(cells.repeat(8, axis=0).repeat(8, axis=1)).convert("RGB")
    assert processor.fit_tiling(image.height, image.width, 6) == tiling
    outputs = processor(image)
    pixels = outputs["pixel_values"][0, 1:].reshape(6, 4, 2, 4, 2, 48)  # crops, pooled rows and columns of 2x2 patches
    values = (pixels.mean(dim=(2, 4, 5)) * 255).round().long().reshape(6, 16)
    positions = outputs["image_input_idx"][0, 1:]
    tokens = positions - (4 * 5 + 2) - 1  # behind the global view and the start token
    places = tokens // (columns + 1) * columns + tokens % (columns + 1)
    kept = positions >= 0
    assert torch.equal(values[kept], places[kept])
    assert sorted(places[kept].tolist()) == list(range(rows * columns))


def test_tier_chooses_the_nearest_aspect_ratio_of_all_tilings():
    processor = MolmoImageProcessor(max_crops=12)
    sizes = [(1, 1), (480, 640), (640, 480), (48, 200), (1000, 10), (7, 1999), (333, 500), (600, 400), (300, 100)]
    for (height, width), (tier, (fewest, most)) in itertools.product(sizes, DEFAULT_TIER_CROPS.items()):
        image_ratio = Fraction(width, height)
        candidates = [
            (max(Fraction(columns, rows) / image_ratio, image_ratio / Fraction(columns, rows)), rows * columns, rows)
            for rows, columns in itertools.product(range(1, 13), repeat=2)
            if fewest <= rows * columns <= min(most, 12)
        ]
        _, crops, rows = min(candidates)
        assert processor.choose_tiling(height, width, tier=tier) == (rows, crops // rows), (height, width, tier)


def test_tier_ties_take_fewer_crops_and_transposed_images_transposed_tilings():
    processor = small_processor()
    assert processor.select_tiling(30, 30, 1, 9) == (1, 1)  # 1x1, 2x2 and 3x3 are all square
    assert processor.select_tiling(30, 60, 2, 8) == (1, 2)  # 1x2 and 2x4 have the image's ratio
    assert processor.select_tiling(45, 80, 4, 8) == tuple(reversed(processor.select_tiling(80, 45, 4, 8)))


def test_small_image_is_enlarged_to_its_tier():
    processor = small_processor()
    image = noise_image(5, 5)
    assert [processor(image, tier=tier)["tilings"][0].tolist() for tier in ("low", "medium", "high")] == [
        [1, 1],
        [2, 2],
        [3, 3],
    ]
    assert (processor(image, tier="high")["image_masks"][0, :-1] == 1).all()
    assert processor(image)["tilings"].tolist() == [[1, 1]]  # without a tier it is enlarged as little as possible


def test_high_tier_is_capped_by_the_checkpoint():
    assert small_processor().tier_range("high") == (9, 9)
    assert MolmoImageProcessor().tier_range("high") == (9, 12)
    assert small_processor().tier_range("medium", {"medium": (2, 20)}) == (2, 9)


def test_batch_pads_views_and_equals_one_by_one():
    processor = small_processor()
    images = [noise_image(64, 64, 1), noise_image(20, 50, 2), noise_image(90, 30, 3)]
    tiers = ["high", "low", "medium"]
    batch = processor(images, tier=tiers)
    for index, (image, tier) in enumerate(zip(images, tiers, strict=True)):
        alone = processor(image, tier=tier)
        views = alone["pixel_values"].shape[1]
        for name, padding in (("pixel_values", -1), ("image_masks", -1), ("image_input_idx", -100)):
            assert torch.equal(batch[name][index, :views], alone[name][0]), (name, index)
            assert (batch[name][index, views:] == padding).all(), (name, index)


def test_every_mode_becomes_rgb():
    processor = small_processor()
    image = noise_image(32, 32)
    expected = processor(image)["pixel_values"]
    assert torch.equal(processor(image.convert("RGBA"))["pixel_values"], expected)
    grey = image.convert("L")
    assert torch.equal(processor(grey)["pixel_values"], processor(grey.convert("RGB"))["pixel_values"])
    palette = image.convert("P")
    assert torch.equal(processor(palette)["pixel_values"], processor(palette.convert("RGB"))["pixel_values"])


def test_transparent_pixels_become_white():
    processor = small_processor(do_normalize=False)
    transparent = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    assert (processor(transparent)["pixel_values"] == 1).all()


def test_exif_orientation_is_followed():
    processor = small_processor()
    image = noise_image(30, 60)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # "turn by 90 degrees clockwise to see it"
    outputs, expected = processor(turned), processor(image)
    assert outputs["tilings"].tolist() == expected["tilings"].tolist()
    assert torch.equal(outputs["pixel_values"], expected["pixel_values"])


def test_padding_is_black_before_normalisation_and_masked():
    processor = small_processor()
    outputs = processor(Image.new("RGB", (32, 16), "white"), max_crops=1)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    for view in outputs["pixel_values"][0].unflatten(-1, (16, 3)):
        torch.testing.assert_close(view[:16], (-mean / std).expand(16, 16, 3))  # the upper two of eight patch rows
        torch.testing.assert_close(view[16:48], ((1 - mean) / std).expand(32, 16, 3))
    mask = outputs["image_masks"][0]
    assert mask[0].tolist() == [0.0] * 16 + [1.0] * 32 + [0.0] * 16
    assert (mask[1] == -1).all()


SIZES = [(64, 48), (5, 7), (7, 90), (90, 1), (32, 32), (33, 500), (211, 140), (640, 480)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiling", [(1, 1), (3, 3), (2, 3), (4, 1)])
def test_pixels_are_those_of_the_reference_steps(size, tiling):
    for processor in (
        small_processor(image_std=[0.2, 0.3, 0.4]),
        small_processor(overlap_margins=[2, 2]),
        small_processor(do_normalize=False),
    ):
        image = noise_image(*size)
        geometry = processor.view_geometry
        expected = reference_pixel_values(processor, image, tiling)
        processor.select_tiling = lambda *_: tiling  # noqa: B023
        pixels = processor(image, tier="low")["pixel_values"]
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels[0], expected, rtol=0, atol=1e-5)
        # What runs on a GPU, where it rounds otherwise.
        interpolated = cut_by_interpolation(torch.from_numpy(np.array(image)), geometry, tiling)
        torch.testing.assert_close(interpolated, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(640, 480), (427, 640), (1600, 1200)])
def test_photographs_are_cut_as_by_the_reference_steps(size):
    processor, image = MolmoImageProcessor(), noise_image(*size)
    for tier in DEFAULT_TIER_CROPS:
        outputs = processor(image, tier=tier)
        expected = reference_pixel_values(processor, image, tuple(outputs["tilings"][0].tolist()))
        torch.testing.assert_close(outputs["pixel_values"][0], expected, rtol=0, atol=1e-5)


def test_no_call_changes_what_another_returned():
    processor, images = small_processor(), [noise_image(64, 48, seed) for seed in range(3)]
    first = processor(images[0], tier="high")
    kept = {name: values.clone() for name, values in first.items()}
    second = processor(images[1], tier="high")
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    for values in second.values():
        values.fill_(7)
    processor(images, tier="high")
    third = processor(images[0], tier="high")
    for name, values in kept.items():
        assert torch.equal(first[name], values), name
        assert torch.equal(third[name], values), name


def test_what_is_kept_in_inference_mode_serves_outside_of_it():
    processor, image = small_processor(), noise_image(37, 41)
    with torch.inference_mode():
        expected = processor(image)
    for name, values in processor(image).items():
        assert torch.equal(values, expected[name]) and not values.is_inference(), name
        values.add_(1)


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_processor()(noise_image(38, 41))


@pytest.mark.parametrize("size", [(32, 16), (9, 5), (100, 70)])
def test_no_pixel_has_the_value_of_padded_views(size):
    """Mean and std under which black normalises to exactly -1, in the image as in its margins."""
    processor = small_processor(image_mean=[1.0] * 3, image_std=[1.0] * 3)
    image = Image.new("RGB", size)
    assert (reference_pixel_values(processor, image, (2, 2)) == -1).all()
    interpolated = cut_by_interpolation(torch.from_numpy(np.array(image)), processor.view_geometry, (2, 2))
    for pixels in (processor(image, max_crops=4)["pixel_values"], interpolated):
        assert (pixels != -1).all()
        torch.testing.assert_close(pixels, torch.full_like(pixels, -1.0))


def test_no_pixel_is_rounded_to_the_value_of_padded_views():
    """Levels around that of -1: in millions of sums of them, some come closer to it than float32 can tell."""
    processor = MolmoImageProcessor()
    level = 255 * (processor.image_mean[0] - processor.image_std[0])
    pixels = np.random.default_rng(0).integers(int(level) - 1, int(level) + 3, (480, 640, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    outputs = processor(image, tier="high")
    assert (reference_pixel_values(processor, image, (3, 4)) == -1).any()
    assert (outputs["pixel_values"] != -1).all()


def test_a_line_of_pixels_keeps_one_row():
    outputs = small_processor(do_normalize=False)(Image.new("RGB", (500, 1), "white"), max_crops=1)
    assert outputs["pixel_values"].amax() == pytest.approx(1)
    assert outputs["image_masks"][0, 0].sum() == pytest.approx(8 / 4)  # eight patches, one of four pixel rows each


def test_a_column_of_pixels_is_a_line_upside_down():
    """Not against torch's `interpolate`, which repeats the first pixel where the result is one pixel wide."""
    processor = small_processor(image_std=[0.2, 0.3, 0.4])
    line = noise_image(90, 1)
    expected, pixels = (
        processor(image, max_crops=1)["pixel_values"].unflatten(2, (8, 8)).unflatten(4, (4, 4, 3))
        for image in (line, line.transpose(Image.Transpose.TRANSPOSE))
    )
    torch.testing.assert_close(pixels, expected.transpose(2, 3).transpose(4, 5), rtol=0, atol=1e-5)


def closed(image: Image.Image) -> Image.Image:
    image.close()
    return image


def truncated(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[: buffer.tell() // 2]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(Image.new("RGB", (0, 4))), "image 0 of the batch: the image has 4x0 pixels"),
        (lambda p: p([noise_image(4, 4), np.zeros((4, 4, 3))]), "image 1 of the batch is a ndarray, not a PIL image"),
        (
            lambda p: p(closed(noise_image(4, 4))),
            "image 0 of the batch: it cannot be read (Operation on closed",
        ),
        (
            lambda p: p([noise_image(4, 4), truncated(noise_image(99, 99))]),
            "image 1 of the batch: it cannot be read (image file is truncated)",
        ),
        (lambda p: p([]), "`images` is empty"),
        (lambda p: p(noise_image(4, 4), tier="huge"), "`tier` is 'huge': the tiers are 'low', 'medium', 'high'"),
        (lambda p: p(noise_image(4, 4), tier="low", max_crops=2), "both `tier`"),
        (lambda p: p([noise_image(4, 4)], tier=["low", "low"]), "2 tiers are given for 1 images"),
        (lambda p: p(noise_image(4, 4), max_crops=0), "`max_crops` is 0"),
        (
            lambda p: p.tier_range("high", {"high": (10, 15)}),
            "starts at 10 crops but the checkpoint's `max_crops` is 9",
        ),
        (lambda p: p.tier_range("high", {"high": (5, 4)}), "has the crop range"),
        (lambda p: p.select_tiling(4, 4, 5, 4), "no tiling has 5 to 4 crops"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError) as error:
        call(small_processor())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap_margins": [1, 1]}, "two multiples of the pooling"),
        ({"overlap_margins": [2]}, "two multiples of the pooling"),
        ({"overlap_margins": [4, 4]}, "nothing is left"),
        ({"base_image_input_size": [32, 64]}, "views are square"),
        ({"image_patch_size": 5}, "whole patches"),
        ({"image_token_length_w": 8}, "the same divisor"),
        ({"image_token_length_h": 3, "image_token_length_w": 3}, "the same divisor"),
        ({"max_crops": 0}, "`max_crops` is 0"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        small_processor(**changes)
    assert message in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_cuts_as_the_cpu_does(published, golden_cases):
    for case, image, golden in golden_cases:
        on_gpu = published(image, max_crops=case["max_crops"], device="cuda")
        assert {name for name, values in on_gpu.items() if not values.is_cuda} == {"tilings"}
        outputs = {name: values.cpu() for name, values in on_gpu.items()}
        names = golden_differences(outputs, golden)
        assert set(names) <= {"crops_sample", "crops_mean"}, case["file"]
        on_cpu = published(image, max_crops=case["max_crops"])
        for name, values in on_cpu.items():
            torch.testing.assert_close(outputs[name], values, rtol=0, atol=1e-3 if name == "pixel_values" else 0)
    images = [noise_image(*size) for size in SIZES]
    for tier in DEFAULT_TIER_CROPS:
        on_gpu, on_cpu = (published(images, tier=tier, device=device) for device in ("cuda", None))
        for name, values in on_cpu.items():
            atol = 1e-3 if name == "pixel_values" else 0
            torch.testing.assert_close(on_gpu[name].cpu(), values, rtol=0, atol=atol)
        assert ((on_gpu["pixel_values"] == -1).flatten(2).sum(dim=2) % on_gpu["pixel_values"][0, 0].numel() == 0).all()

"""
Times the way from a Parquet file to the executor's input: reading a row, decoding its JPEG, cutting the image into views.

```bash
joint-controller bench data
```

In the same run, image by image in turn, the same views are made in the plain way, one array after the other.
"""

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F
from transformers.hf_argparser import HfArg

from ..data import load_vqa_dataset
from ..molmo import MolmoImageProcessor
from ..molmo.knob_space import TIERS
from ..scripts import ScriptParser, run_script
from .common import BenchArguments, check_at_least, machine, make_table, own_memory_mb, use_threads, write_results


NUM_FILES = 64
"""Different images. More rows than that repeat them, each with its own bytes in the file."""

ROWS_PER_GROUP = 100
"""Rows that are written to the Parquet file at once."""

WARM_UP_ROWS = 200
"""Rows after which memory should have stopped growing."""

LOAD, PREPROCESS, PLAIN = "load", "preprocess", ", plain way"
"""Stages of the table."""


@dataclass(kw_only=True)
class BenchDataArguments(BenchArguments):
    """
    Arguments of `joint-controller bench data`. Views have MolmoE-1B's sizes: 336×336 pixels, at most 12 crops.
    """

    num_images: int = HfArg(default=200, help="Images that are timed.")
    num_rows: int = HfArg(
        default=5000,
        help="Rows that are read and preprocessed while memory is watched. 0: none. A row of 640×480 pixels takes 0.3 MB "
        "in the folder for temporary files.",
    )
    image_size: list[int] = HfArg(
        default_factory=lambda: [640, 480], help="Width and height of the images, in pixels."
    )
    tier: str = HfArg(default="high", help="Tier of the images.", metadata={"choices": TIERS})


def main(args: BenchDataArguments) -> None:
    """Times loading and preprocessing, watches memory, and shows and writes what was found."""
    check_at_least(args, {"num_images": 1})
    if args.num_rows and args.num_rows <= WARM_UP_ROWS:
        raise ValueError(
            f"`num_rows` is {args.num_rows}: give more than the {WARM_UP_ROWS} rows of the warm-up, or 0 for none."
        )
    if len(args.image_size) != 2 or min(args.image_size) < 2:
        raise ValueError(f"`image_size` is {args.image_size}: give width and height, 2 or more each.")
    processor = MolmoImageProcessor()
    width, height = args.image_size
    cpu = torch.device("cpu")
    num_rows = max(args.num_images, args.num_rows)
    with use_threads(args.num_threads, cpu), _data_set(args.image_size, num_rows) as (dataset, bytes_per_image):
        times, largest_difference = _time(dataset, processor, args)
        results = {
            **machine(cpu),
            "image_size": args.image_size,
            "bytes_per_image": bytes_per_image,
            "tier": args.tier,
            "num_views": 1 + int(np.prod(processor.choose_tiling(height, width, tier=args.tier))),
            "num_images": args.num_images,
            "num_threads": torch.get_num_threads(),
            "largest_pixel_difference": largest_difference,
            "stages": {
                stage: {
                    "median_ms": 1000 * statistics.median(seconds),
                    "p90_ms": 1000 * float(np.quantile(seconds, 0.9)),
                    "images_per_s": len(seconds) / sum(seconds),
                }
                for stage, seconds in times.items()
            },
            "memory": _watch_memory(dataset, processor, args) if args.num_rows else None,
        }
    write_results(results, args.json)
    console = Console()
    table = make_table(
        f"{args.num_images} images of {width}x{height} (JPEG, {bytes_per_image / 1000:.0f} kB), tier {args.tier} "
        f"({results['num_views']} views), {results['device_name']}",
        ("stage", "median, ms", "90 % below, ms", "images/s"),
        caption=f"The two ways give the same pixels but for {largest_difference:.1g} of a standard deviation at most.",
    )
    for stage, numbers in results["stages"].items():
        table.add_row(stage, *(f"{number:.1f}" for number in numbers.values()))
    console.print(table)
    if args.num_rows:
        console.print(
            "Memory over {num_rows:,} rows ({images_per_s:.1f} images/s): {warm_mb:.0f} MB after {warm_up_rows} rows, "
            "{peak_mb:.0f} MB at most afterwards.".format(**results["memory"])
        )


@contextmanager
def _data_set(image_size: list[int], num_rows: int) -> Iterator[tuple[datasets.Dataset, int]]:
    """A data set of JPEG images, read from a Parquet file, and the bytes of an image, on average."""
    files = [_make_jpeg(seed, *image_size) for seed in range(min(NUM_FILES, num_rows))]
    schema = pa.schema(
        {
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "question": pa.string(),
            "answers": pa.list_(pa.string()),
        }
    )
    usual = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.parquet"
        with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
            for start in range(0, num_rows, ROWS_PER_GROUP):
                rows = range(start, min(start + ROWS_PER_GROUP, num_rows))
                columns = {
                    "image": [{"bytes": files[row % len(files)], "path": None} for row in rows],
                    "question": [f"what is in image {row}?" for row in rows],
                    "answers": [["a"]] * len(rows),
                }
                writer.write_table(pa.table(columns, schema=schema))
        # The table that `datasets` makes of the file is of no use afterwards.
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        try:
            yield load_vqa_dataset(str(path)), sum(map(len, files)) // len(files)
        finally:
            datasets.config.HF_DATASETS_CACHE = usual


def _make_jpeg(seed: int, width: int, height: int) -> bytes:
    """
    Colour noise with the spectrum of a photograph (amplitude falls as 1 / frequency). At 640×480 pixels a file has 153 kB,
    as much as one of COCO's does on average (18 GB of 118,000 training images).
    """
    generator = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(generator.standard_normal((3, height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(spectrum / frequency, s=(height, width))
    pixels = 128 + 48 * noise / noise.std(axis=(1, 2), keepdims=True)
    encoded = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    image.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def _time(
    dataset: datasets.Dataset, processor: MolmoImageProcessor, args: BenchDataArguments
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each stage for each image, and the largest difference between the pixels of the two ways."""
    ways = {PREPROCESS: _preprocess, PREPROCESS + PLAIN: _preprocess_plainly}
    times: dict[str, list[float]] = {LOAD: [], **{way: [] for way in ways}}
    largest_difference = 0.0
    for row in [0, *range(args.num_images)]:  # the first one warms up
        start = time.perf_counter()
        image = dataset[row]["image"]
        times[LOAD].append(time.perf_counter() - start)
        views = []
        for way in list(ways)[:: 1 if row % 2 else -1]:  # in turn, so that neither has the caches to itself
            start = time.perf_counter()
            views.append(ways[way](processor, image, args.tier))
            times[way].append(time.perf_counter() - start)
        largest_difference = max(largest_difference, (views[0] - views[1]).abs().max().item())
    times = {stage: seconds[1:] for stage, seconds in times.items()}
    for stage in ways:
        times[f"{LOAD} and {stage}"] = [sum(pair) for pair in zip(times[LOAD], times[stage], strict=True)]
    return times, largest_difference


def _preprocess(processor: MolmoImageProcessor, image: Image.Image, tier: str) -> torch.Tensor:
    return processor(image, tier=tier)["pixel_values"][0]


def _preprocess_plainly(processor: MolmoImageProcessor, image: Image.Image, tier: str) -> torch.Tensor:
    """
    The same views as a reader of the published description would make them: resize, pad, normalise, then cut view after
    view and rearrange each to patches, with NumPy.
    """
    [view_size, _], patch = processor.base_image_input_size, processor.image_patch_size
    left, right = (margin * patch for margin in processor.overlap_margins)
    window = view_size - left - right
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    rows, columns = processor.choose_tiling(image.height, image.width, tier=tier)

    def resize_and_pad(height: int, width: int) -> np.ndarray:
        scale = min(np.float32(height) / np.float32(image.height), np.float32(width) / np.float32(image.width))
        new_size = int(image.height * scale), int(image.width * scale)
        channels_first = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())
        resized = F.interpolate(channels_first, size=new_size, mode="bilinear", antialias=True)[0]
        resized = np.clip(resized.numpy().transpose(1, 2, 0), 0, 1)
        top, side = (height - new_size[0]) // 2, (width - new_size[1]) // 2
        margins = [(top, height - new_size[0] - top), (side, width - new_size[1] - side), (0, 0)]
        padded = np.pad(resized, margins)
        return (padded - np.array(processor.image_mean, np.float32)) / np.array(processor.image_std, np.float32)

    tiled = resize_and_pad(rows * window + left + right, columns * window + left + right)
    views = [resize_and_pad(view_size, view_size)]
    for row in range(rows):
        for column in range(columns):
            top, side = row * window, column * window
            views.append(tiled[top : top + view_size, side : side + view_size])
    length = view_size // patch
    patches = [
        view.reshape(length, patch, length, patch, 3).transpose(0, 2, 1, 3, 4).reshape(length**2, -1) for view in views
    ]
    return torch.from_numpy(np.stack(patches))


def _watch_memory(
    dataset: datasets.Dataset, processor: MolmoImageProcessor, args: BenchDataArguments
) -> dict[str, float]:
    """Memory of the process while it reads and preprocesses rows, in MB: after the warm-up, and at most from there on."""
    start, used = time.perf_counter(), []
    for row in range(args.num_rows):
        _preprocess(processor, dataset[row]["image"], args.tier)
        used.append(own_memory_mb())
    images_per_s = args.num_rows / (time.perf_counter() - start)
    warm, peak = max(used[:WARM_UP_ROWS]), max(used[WARM_UP_ROWS:])
    return {
        "num_rows": args.num_rows,
        "warm_up_rows": WARM_UP_ROWS,
        "warm_mb": warm,
        "peak_mb": peak,
        "growth_mb": peak - warm,
        "images_per_s": images_per_s,
    }


def make_parser() -> ScriptParser:
    return ScriptParser([BenchDataArguments])


if __name__ == "__main__":
    sys.exit(run_script("bench data", make_parser, main))

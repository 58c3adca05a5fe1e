"""
Times the way from a Parquet file to the executor's input: reading a row, decoding its JPEG, cutting the image into views.

```bash
joint-controller bench data
```

Beside it, in the same run and image by image in turn, the same views are made in the plain way, one array after the other.
"""

import io
import json
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..scripts import ScriptParser, run_script


if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..molmo import MolmoImageProcessor


NUM_FILES = 64
"""Different images. More rows than that repeat them, each with its own bytes in the file."""

ROWS_PER_GROUP = 100
"""Rows that are written to the Parquet file at once."""

WARM_UP_ROWS = 200
"""Rows after which memory should have stopped growing."""

LOAD, PREPROCESS, PLAIN = "load", "preprocess", ", plain way"
"""Stages of the table."""

PIXEL_TOLERANCE = 1e-5
"""Largest difference between the two ways, in normalised pixels: both round in float32, in another order."""


@dataclass
class BenchDataArguments:
    """
    Arguments of `joint-controller bench data`. Views have MolmoE-1B's sizes: 336×336 pixels, at most 12 crops.
    """

    num_images: int = field(default=200, metadata={"help": "Images that are timed."})
    num_rows: int = field(
        default=5000,
        metadata={
            "help": "Rows that are read and preprocessed while memory is watched. 0: none. A row of 640×480 pixels takes "
            "0.3 MB in the folder for temporary files."
        },
    )
    image_size: list[int] = field(
        default_factory=lambda: [640, 480], metadata={"help": "Width and height of the images, in pixels."}
    )
    tier: str = field(default="high", metadata={"help": "Tier of the images.", "choices": ["low", "medium", "high"]})
    num_threads: int = field(default=1, metadata={"help": "Threads that share one operation on the CPU."})
    max_memory_growth_mb: float = field(
        default=64,
        metadata={
            "help": f"Growth of the process's own memory after {WARM_UP_ROWS} rows, in MB, from which the benchmark fails."
        },
    )
    json: str | None = field(default=None, metadata={"help": "File to write the results to, too."})


def main(args: BenchDataArguments):
    _check(args)
    import torch
    from rich.console import Console

    from ..data import load_vqa_dataset
    from ..latency.profiling import device_name
    from ..molmo import MolmoImageProcessor

    console = Console()
    processor = MolmoImageProcessor()
    width, height = args.image_size
    num_views = 1 + int(np.prod(processor.choose_tiling(height, width, tier=args.tier)))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(args.num_threads)
    try:
        with tempfile.TemporaryDirectory() as folder, _cache_in(folder):
            path = Path(folder) / "train.parquet"
            bytes_per_image = _write_images(path, max(args.num_images, args.num_rows), args.image_size)
            dataset = load_vqa_dataset(str(path))
            times, largest_difference = _time(dataset, processor, args)
            memory = _watch_memory(dataset, processor, args) if args.num_rows else None
    finally:
        torch.set_num_threads(num_threads)
    results = {
        "image_size": args.image_size,
        "bytes_per_image": bytes_per_image,
        "tier": args.tier,
        "num_views": num_views,
        "num_images": args.num_images,
        "num_threads": args.num_threads,
        "device_name": device_name(torch.device("cpu")),
        "torch_version": torch.__version__,
        "largest_pixel_difference": largest_difference,
        "stages": {name: _summarize(seconds) for name, seconds in times.items()},
        "memory": memory,
    }
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(_format_table(results))
    if memory is not None:
        console.print(
            f"Memory over {args.num_rows:,} rows ({memory['images_per_s']:.1f} images/s): {memory['warm_mb']:.0f} MB after "
            f"{memory['warm_up_rows']} rows, {memory['peak_mb']:.0f} MB at most afterwards."
        )
        if memory["growth_mb"] > args.max_memory_growth_mb:
            raise ValueError(
                f"memory grew by {memory['growth_mb']:.0f} MB over {args.num_rows:,} rows, which is more than "
                f"{args.max_memory_growth_mb:g} MB: something keeps what it has read."
            )


def _check(args: BenchDataArguments):
    if args.num_images < 1:
        raise ValueError(f"`num_images` is {args.num_images}: give 1 or more.")
    if args.num_rows and args.num_rows <= WARM_UP_ROWS:
        raise ValueError(
            f"`num_rows` is {args.num_rows}: give more than the {WARM_UP_ROWS} rows of the warm-up, or 0 for none."
        )
    if len(args.image_size) != 2 or min(args.image_size) < 2:
        raise ValueError(f"`image_size` is {args.image_size}: give width and height, 2 or more each.")
    if args.num_threads < 1:
        raise ValueError(f"`num_threads` is {args.num_threads}: give 1 or more.")


@contextmanager
def _cache_in(folder: str):
    """The table that `datasets` makes of the Parquet file is of no use afterwards."""
    import datasets

    usual = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = usual


def _write_images(path: Path, num_rows: int, image_size: list[int]) -> int:
    """Writes rows with JPEG images in the schema of data sets. Returns the bytes of an image, on average."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [_make_jpeg(seed, *image_size) for seed in range(min(NUM_FILES, num_rows))]
    schema = pa.schema(
        {
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "question": pa.string(),
            "answers": pa.list_(pa.string()),
        }
    )
    with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for start in range(0, num_rows, ROWS_PER_GROUP):
            rows = range(start, min(start + ROWS_PER_GROUP, num_rows))
            columns = {
                "image": [{"bytes": files[row % len(files)], "path": None} for row in rows],
                "question": [f"what is in image {row}?" for row in rows],
                "answers": [["a"]] * len(rows),
            }
            writer.write_table(pa.table(columns, schema=schema))
    return sum(map(len, files)) // len(files)


def _make_jpeg(seed: int, width: int, height: int) -> bytes:
    """
    Colour noise with the spectrum of a photograph (amplitude falls as 1 / frequency). At 640×480 pixels a file has 153 kB,
    as much as one of COCO's does on average (18 GB of 118,000 training images).
    """
    from PIL import Image

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


def _time(dataset, processor: "MolmoImageProcessor", args: BenchDataArguments) -> tuple[dict[str, list[float]], float]:
    """Seconds of each stage for each image, and the largest difference between the pixels of the two ways."""
    times: dict[str, list[float]] = {LOAD: [], PREPROCESS: [], PREPROCESS + PLAIN: []}
    largest_difference = 0.0

    def timed(stage: str, function, *function_args):
        start = time.perf_counter()
        result = function(*function_args)
        times[stage].append(time.perf_counter() - start)
        return result

    for row in [0, *range(args.num_images)]:  # the first one warms up
        image = timed(LOAD, lambda row=row: dataset[row]["image"])
        # In turn, so that neither has the caches to itself.
        ways = [(PREPROCESS, _preprocess), (PREPROCESS + PLAIN, _preprocess_plainly)]
        first, second = (
            timed(stage, way, processor, image, args.tier) for stage, way in ways[:: 1 if row % 2 else -1]
        )
        largest_difference = max(largest_difference, (first - second).abs().max().item())
    if largest_difference > PIXEL_TOLERANCE:
        raise RuntimeError(f"the two ways differ by {largest_difference}, so their times cannot be compared.")
    times = {stage: seconds[1:] for stage, seconds in times.items()}
    for stage in (PREPROCESS, PREPROCESS + PLAIN):
        times[f"{LOAD} and {stage}"] = [sum(pair) for pair in zip(times[LOAD], times[stage], strict=True)]
    return times, largest_difference


def _preprocess(processor: "MolmoImageProcessor", image: "Image.Image", tier: str) -> "torch.Tensor":
    return processor(image, tier=tier)["pixel_values"][0]


def _preprocess_plainly(processor: "MolmoImageProcessor", image: "Image.Image", tier: str) -> "torch.Tensor":
    """
    The same views as a reader of the published description would make them: resize, pad, normalise, then cut view after
    view and rearrange each to patches, with NumPy.
    """
    import torch
    from torch.nn import functional as F

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


def _watch_memory(dataset, processor: "MolmoImageProcessor", args: BenchDataArguments) -> dict:
    """Memory of the process while it reads and preprocesses rows, in MB: after the warm-up, and at most from there on."""
    start = time.perf_counter()
    warm, peak = 0.0, 0.0
    for row in range(args.num_rows):
        _preprocess(processor, dataset[row]["image"], args.tier)
        if row < WARM_UP_ROWS:
            warm = max(warm, own_memory_mb())
        else:
            peak = max(peak, own_memory_mb())
    seconds = time.perf_counter() - start
    return {
        "num_rows": args.num_rows,
        "warm_up_rows": WARM_UP_ROWS,
        "warm_mb": warm,
        "peak_mb": peak,
        "growth_mb": peak - warm,
        "images_per_s": args.num_rows / seconds,
    }


def own_memory_mb() -> float:
    """
    Resident memory of this process, in MB, without what it shares with the system's cache of files: a table on disk is
    mapped into memory as it is read, and those pages are given back whenever another needs them.
    """
    import psutil

    memory = psutil.Process().memory_info()
    # Only Linux tells what is shared.
    return (memory.rss - getattr(memory, "shared", 0)) / 1e6


def _summarize(seconds: list[float]) -> dict[str, float]:
    return {
        "median_ms": 1000 * statistics.median(seconds),
        "p90_ms": 1000 * float(np.quantile(seconds, 0.9)),
        "images_per_s": len(seconds) / sum(seconds),
    }


def _format_table(results: dict):
    from rich.table import Table

    width, height = results["image_size"]
    table = Table(
        title=f"{results['num_images']} images of {width}x{height} (JPEG, {results['bytes_per_image'] / 1000:.0f} kB), tier "
        f"{results['tier']} ({results['num_views']} views), {results['device_name']}",
        title_justify="left",
    )
    for name in ("stage", "median, ms", "90 % below, ms", "images/s"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, numbers in results["stages"].items():
        table.add_row(
            stage, f"{numbers['median_ms']:.1f}", f"{numbers['p90_ms']:.1f}", f"{numbers['images_per_s']:.1f}"
        )
    return table


def make_parser() -> ScriptParser:
    return ScriptParser((BenchDataArguments,))


if __name__ == "__main__":
    sys.exit(run_script("bench data", make_parser, main))

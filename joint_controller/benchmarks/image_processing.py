"""
Times cutting images into views against the same steps by torch's `interpolate`.

```bash
joint-controller bench image-processing
```

Both start from an image in memory, and run on the CPU in turn, so that they see the same machine. On a GPU, the way of an
image to pixels on the device is timed, too.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F
from transformers.hf_argparser import HfArg

from ..executor import embedded_executor_path
from ..images import rgb_pixels
from ..molmo import MolmoImageProcessor
from ..molmo.view_cutting import ViewGeometry
from ..scripts import ScriptParser, run_script
from .common import DeviceBenchArguments, check_at_least, machine, make_table, use_threads, write_results


class Case(NamedTuple):
    """An image, and into how many crops it is cut."""

    width: int
    height: int
    num_crops: int


MOLMOE_CASES = (
    *(Case(640, 480, num_crops) for num_crops in (12, 6, 3)),
    *(Case(*size, num_crops=12) for size in ((480, 640), (1000, 250), (64, 48), (1600, 1200))),
)
EMBEDDED_CASES = (Case(640, 480, 9), Case(64, 64, 9), Case(64, 64, 1))


@dataclass(kw_only=True)
class BenchImageProcessingArguments(DeviceBenchArguments):
    """
    Arguments of `joint-controller bench image-processing`. Views have the sizes of MolmoE-1B, and of the embedded executor.
    """

    repeats: int = HfArg(default=30, help="Times that each image is cut; medians are shown.")


def main(args: BenchImageProcessingArguments) -> None:
    """Times both ways for each image, and shows and writes what they took."""
    check_at_least(args, {"repeats": 1})
    device = args.torch_device()
    processors = {
        "MolmoE-1B": (MolmoImageProcessor(), MOLMOE_CASES),
        "embedded": (MolmoImageProcessor.from_pretrained(embedded_executor_path()), EMBEDDED_CASES),
    }
    with use_threads(args.num_threads, torch.device("cpu")):
        results = {
            "cpu": machine(torch.device("cpu")),
            "device": machine(device),
            "num_threads": torch.get_num_threads(),
            "repeats": args.repeats,
            "images": [
                {"executor": name, **case._asdict(), **_time(processor, case, args, device)}
                for name, (processor, cases) in processors.items()
                for case in cases
            ],
        }
    write_results(results, args.json)
    is_gpu = device.type != "cpu"
    table = make_table(
        f"Cutting an image into views, {results['num_threads']} thread(s) (ms, medians)",
        (
            "",
            "views",
            "interpolate",
            "processor",
            "ratio",
            "difference",
            *(["on the GPU", "difference"] if is_gpu else []),
        ),
        caption="Differences are the largest of any pixel to those of `interpolate` on the CPU, in standard deviations.",
    )
    for row in results["images"]:
        cells = [f"{row['executor']}, {row['width']}x{row['height']}", str(row["num_views"])]
        cells += [f"{row[way]['median_ms']:.2f}" for way in ("interpolate", "processor")]
        cells += [f"{row['ratio']:.1f}", f"{row['processor']['largest_difference']:.1e}"]
        if is_gpu:
            cells += [f"{row['device']['median_ms']:.2f}", f"{row['device']['largest_difference']:.1e}"]
        table.add_row(*cells)
    Console().print(table)


def _time(
    processor: MolmoImageProcessor, case: Case, args: BenchImageProcessingArguments, device: torch.device
) -> dict[str, Any]:
    """Times of each way to cut an image of noise, in turn, and how far its pixels are from those of the first."""
    size = (case.height, case.width, 3)
    image = Image.fromarray(np.random.default_rng(args.seed).integers(0, 256, size, dtype=np.uint8))
    crops = {"tier": "given", "tier_crops": {"given": (case.num_crops, case.num_crops)}}
    tiling = processor.choose_tiling(case.height, case.width, **crops)
    geometry = processor.view_geometry

    def process_on_device() -> torch.Tensor:
        pixel_values = processor(image, **crops, device=device)["pixel_values"][0]
        torch.accelerator.synchronize(device)
        return pixel_values

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "interpolate": lambda: _cut_by_interpolation(image, geometry, tiling),
        "processor": lambda: processor(image, **crops)["pixel_values"][0],
    }
    if device.type != "cpu":
        ways["device"] = process_on_device
    expected = ways["interpolate"]()
    differences = {way: (cut().cpu() - expected).abs().max().item() for way, cut in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, cut in ways.items():
            cut()  # what the other way has left in the caches, and in the memory that is free, is not timed
            started = time.perf_counter()
            cut()
            times[way].append(1000 * (time.perf_counter() - started))
    medians = {way: statistics.median(times_ms) for way, times_ms in times.items()}
    return {
        "num_views": 1 + tiling[0] * tiling[1],
        "ratio": medians["interpolate"] / medians["processor"],
        **{way: {"median_ms": medians[way], "largest_difference": differences[way]} for way in ways},
    }


def _cut_by_interpolation(image: Image.Image, geometry: ViewGeometry, tiling: tuple[int, int]) -> torch.Tensor:
    """The views of an image, step by step: planes of pixels, resized and normalised; a canvas; views of patches."""
    side, patch = geometry.side, geometry.patch
    mean, std = (torch.tensor(values)[:, None, None] for values in (geometry.mean, geometry.std))
    pixels = torch.tensor(rgb_pixels(image))
    planes = pixels.permute(2, 0, 1).contiguous().float().div_(255)
    views = torch.empty(1 + tiling[0] * tiling[1], side**2, 3 * patch**2)
    for grid, part in (((1, 1), views[:1]), (tiling, views[1:])):
        place = geometry.place(tuple(pixels.shape[:2]), grid)
        resized = F.interpolate(planes[None], size=(place.height, place.width), mode="bilinear", antialias=True)[0]
        resized.clamp_(0, 1).sub_(mean).div_(std)
        canvas = (-mean / std).flatten().repeat(place.rows * patch, place.columns * patch, 1)
        covered = canvas[place.top : place.top + place.height, place.left : place.left + place.width]
        for channel, plane in enumerate(resized):  # faster than in one copy
            covered[:, :, channel] = plane
        crops = canvas.unfold(0, side * patch, geometry.window * patch).unfold(
            1, side * patch, geometry.window * patch
        )
        crops = crops.unflatten(4, (side, patch)).unflatten(3, (side, patch)).permute(0, 1, 3, 5, 4, 6, 2)
        part.view(*grid, side, side, patch, patch, 3).copy_(crops)
    return views


def make_parser() -> ScriptParser:
    return ScriptParser([BenchImageProcessingArguments])


if __name__ == "__main__":
    sys.exit(run_script("bench image-processing", make_parser, main))

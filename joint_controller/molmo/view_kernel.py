"""
Cuts an image into views by one Triton kernel: resize, normalisation, padding and patches at once, so that the host launches one
thing in place of a dozen. With `TRITON_INTERPRET=1` in the environment it runs on a CPU, slowly: for tests.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .view_cutting import PADDED_VIEW_VALUE, ViewGeometry


# Sizes and places differ from image to image: no code of its own for those that are 1 or divisible by 16.
_NUMBERS = (
    *("height", "width", "columns", "global_height", "global_width", "global_top", "global_left"),
    *("crops_height", "crops_width", "crops_top", "crops_left", "global_taps_y", "global_taps_x"),
    *("crops_taps_y", "crops_taps_x"),
)


@triton.jit(do_not_specialize=_NUMBERS)
def _cut(
    source_ptr,
    constants_ptr,
    out_ptr,
    height,
    width,
    columns,
    global_height,
    global_width,
    global_top,
    global_left,
    crops_height,
    crops_width,
    crops_top,
    crops_left,
    global_taps_y,
    global_taps_x,
    crops_taps_y,
    crops_taps_x,
    PADDED: tl.constexpr,
    SIDE: tl.constexpr,
    PATCH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program writes a patch of a view. `constants` holds what values are multiplied with, and what is added then, for each
    channel."""
    view = tl.program_id(0) // (SIDE * SIDE)
    patch = tl.program_id(0) % (SIDE * SIDE)
    is_global = view == 0
    crop = tl.maximum(view - 1, 0)
    patch_row = patch // SIDE + tl.where(is_global, 0, crop // columns * WINDOW)
    patch_column = patch % SIDE + tl.where(is_global, 0, crop % columns * WINDOW)
    # How large the image is in the canvas.
    image_height = tl.where(is_global, global_height, crops_height)
    image_width = tl.where(is_global, global_width, crops_width)
    taps_y = tl.where(is_global, global_taps_y, crops_taps_y)
    taps_x = tl.where(is_global, global_taps_x, crops_taps_x)

    place = tl.arange(0, BLOCK)
    channel = place % 3
    y = patch_row * PATCH + place // (3 * PATCH) - tl.where(is_global, global_top, crops_top)
    x = patch_column * PATCH + place // 3 % PATCH - tl.where(is_global, global_left, crops_left)
    is_written = place < 3 * PATCH * PATCH
    inside = is_written & (y >= 0) & (y < image_height) & (x >= 0) & (x < image_width)

    # The filter of torch's antialiased bilinear interpolation: a triangle, as wide as a pixel of the result.
    scale_y = height.to(tl.float64) / image_height.to(tl.float64)
    scale_x = width.to(tl.float64) / image_width.to(tl.float64)
    support_y = tl.maximum(scale_y, 1.0)
    support_x = tl.maximum(scale_x, 1.0)
    center_y = scale_y * (y.to(tl.float64) + 0.5)
    center_x = scale_x * (x.to(tl.float64) + 0.5)
    first_y = tl.maximum((center_y - support_y + 0.5).to(tl.int32), 0)
    first_x = tl.maximum((center_x - support_x + 0.5).to(tl.int32), 0)
    end_y = tl.minimum((center_y + support_y + 0.5).to(tl.int32), height)
    end_x = tl.minimum((center_x + support_x + 0.5).to(tl.int32), width)
    from_y = (first_y.to(tl.float64) - center_y + 0.5).to(tl.float32)
    from_x = (first_x.to(tl.float64) - center_x + 0.5).to(tl.float32)
    per_y = (1.0 / support_y).to(tl.float32)
    per_x = (1.0 / support_x).to(tl.float32)

    total = tl.zeros((BLOCK,), tl.float32)
    sum_y = tl.zeros((BLOCK,), tl.float32)
    sum_x = tl.zeros((BLOCK,), tl.float32)
    for tap_x in range(taps_x):
        weight_x = tl.maximum(1.0 - tl.abs(from_x + tap_x) * per_x, 0.0)
        sum_x += tl.where(first_x + tap_x < end_x, weight_x, 0.0)
    for tap_y in range(taps_y):
        weight_y = tl.maximum(1.0 - tl.abs(from_y + tap_y) * per_y, 0.0)
        sum_y += tl.where(first_y + tap_y < end_y, weight_y, 0.0)
        row_ptr = source_ptr + (first_y + tap_y) * width * 4 + channel
        for tap_x in range(taps_x):
            weight_x = tl.maximum(1.0 - tl.abs(from_x + tap_x) * per_x, 0.0)
            is_read = inside & (first_y + tap_y < end_y) & (first_x + tap_x < end_x)
            pixel = tl.load(row_ptr + (first_x + tap_x) * 4, mask=is_read, other=0)
            total += weight_y * weight_x * pixel.to(tl.float32)
    # What is outside of the image is black.
    value = total / tl.where(inside, sum_y * sum_x, 1.0)
    value = value * tl.load(constants_ptr + channel) + tl.load(constants_ptr + 3 + channel)
    # The model takes a view with a pixel of exactly the value of padded views for one of them.
    value = tl.where(value == PADDED, PADDED + 2.0**-24, value)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * (3 * PATCH * PATCH) + place, value, mask=is_written)


def cut_by_kernel(pixels: torch.Tensor, geometry: ViewGeometry, tiling: tuple[int, int]) -> torch.Tensor:
    """
    The views `(1 + crops, patches, 3 · patch²)` of an image, on its device. The host waits for nothing.

    Args:
        pixels (`torch.Tensor` of shape `(height, width, 4)`):
            The image, uint8, contiguous. The fourth channel is left out.
        geometry ([`ViewGeometry`]):
            How it is cut.
        tiling (`tuple[int, int]`):
            Rows and columns of crops.
    """
    height, width, _ = pixels.shape
    side, patch = geometry.side, geometry.patch
    views = torch.empty(1 + tiling[0] * tiling[1], side**2, 3 * patch**2, device=pixels.device)
    places = [geometry.place((height, width), grid) for grid in ((1, 1), tiling)]
    taps = [
        math.ceil(2 * max(1.0, given / wanted)) + 1
        for place in places
        for given, wanted in ((height, place.height), (width, place.width))
    ]
    _cut[(len(views) * side**2,)](
        pixels,
        _constants(geometry, pixels.device),
        views,
        height,
        width,
        tiling[1],
        *places[0][:4],
        *places[1][:4],
        *taps,
        PADDED=PADDED_VIEW_VALUE,
        SIDE=side,
        PATCH=patch,
        WINDOW=geometry.window,
        BLOCK=triton.next_power_of_2(3 * patch**2),
    )
    return views


@lru_cache(maxsize=8)
def _constants(geometry: ViewGeometry, device: torch.device) -> torch.Tensor:
    return torch.cat(geometry.normalisation()).to(device)

"""
From an image's pixels to the patches of its views: resized, normalised, padded and cut, with few passes over the pixels.

Resizing is linear, and so are normalising, padding and cutting: on a CPU, one sparse product makes columns of patches out
of the pixels of each row, and one gathering of weighted sums makes all patches out of these. That is several times faster
than torch's `interpolate`, which a GPU is best at.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F


PADDED_VIEW_VALUE = -1.0
"""Fills pixels and masks of the views that pad a batch; the vision tower skips a view with a pixel of this value."""

COUNTERWEIGHT = 1.5 + 2**-23
"""
Is subtracted from normalised pixels before the last sums, and added by them, so that no pixel becomes exactly -1: before it
is added, such a pixel would be -2.5 - 2^-23, but float32 has only multiples of 2^-22 between -4 and -2.
"""


class Placement(NamedTuple):
    """Where a resized image lies in its canvas, in pixels, and the canvas's size in patches."""

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int


@dataclass(frozen=True)
class ViewGeometry:
    """
    How an image becomes views.

    Args:
        side (`int`):
            Patches on a side of a view.
        patch (`int`):
            Pixels on a side of a patch.
        window (`int`):
            Patches from the start of a crop to the start of its neighbour.
        mean, std (`tuple[float, ...]`):
            Of each channel, where pixels range from 0 to 1.
    """

    side: int
    patch: int
    window: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @lru_cache(maxsize=256)  # noqa: B019 (geometries are few, and values)
    def place(self, size: tuple[int, int], tiling: tuple[int, int]) -> Placement:
        """The place of an image of a height and width in the canvas that a tiling cuts into crops."""
        canvas_patches = [(count - 1) * self.window + self.side for count in tiling]
        # In float32, as in the published code: a size may otherwise come out one pixel larger or smaller.
        canvas = np.array(canvas_patches, dtype=np.float32) * self.patch
        given = np.array(size, dtype=np.float32)
        # A very long image keeps at least one row (column) of pixels.
        height, width = np.maximum((given * (canvas / given).min()).astype(int), 1).tolist()
        top, left = (
            count * self.patch - length for count, length in zip(canvas_patches, (height, width), strict=True)
        )
        return Placement(height, width, top // 2, left // 2, *canvas_patches)

    def normalisation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What pixels from 0 to 255 are multiplied with, and what is added then, for each channel."""
        mean, std = np.array(self.mean), np.array(self.std)
        return torch.tensor(1 / (255 * std), dtype=torch.float32), torch.tensor(-mean / std, dtype=torch.float32)


def view_masks(geometry: ViewGeometry, size: tuple[int, int], tiling: tuple[int, int]) -> torch.Tensor:
    """Masks `(1 + crops, patches)` of the views of an image of a height and width: the share of each patch of the crops
    that the image covers, and a last row of -1."""
    place = geometry.place(size, tiling)
    side, patch = geometry.side, geometry.patch

    def covered(start: int, length: int, num_patches: int) -> torch.Tensor:
        return (torch.arange(num_patches + 1) * patch).clamp(start, start + length).diff().float()

    rows = covered(place.top, place.height, place.rows)
    columns = covered(place.left, place.width, place.columns)
    masks = (rows[:, None] * columns / patch**2).unfold(0, side, geometry.window).unfold(1, side, geometry.window)
    # The reference makes room for the global view at the wrong end, and the released weights were trained so.
    return F.pad(masks.reshape(-1, side * side), (0, 0, 0, 1), value=PADDED_VIEW_VALUE)


# ---- on a device ----------------------------------------------------------------------------------------------------


def upload(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies pixels to a device. From pinned memory, which torch keeps for the next image, the host waits for nothing."""
    staged = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    staged.numpy()[:] = pixels
    return staged.to(device, non_blocking=True)


def cut_on_device(pixels: torch.Tensor, geometry: ViewGeometry, tiling: tuple[int, int]) -> torch.Tensor:
    """As [`cut_by_interpolation`], by a kernel of our own where there is Triton, which the host launches in a fifth of the
    time."""
    if not _has_triton():
        return cut_by_interpolation(pixels, geometry, tiling)
    from .view_kernel import cut_by_kernel  # imported here: CPU builds of torch come without Triton

    return cut_by_kernel(pixels, geometry, tiling)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def cut_by_interpolation(pixels: torch.Tensor, geometry: ViewGeometry, tiling: tuple[int, int]) -> torch.Tensor:
    """
    The views `(1 + crops, patches, 3 · patch²)` of an image, on its device, with torch's `interpolate`. The host waits
    for nothing.

    Args:
        pixels (`torch.Tensor` of shape `(height, width, 4)`):
            The image, uint8. The fourth channel is left out.
        geometry ([`ViewGeometry`]):
            How it is cut.
        tiling (`tuple[int, int]`):
            Rows and columns of crops.
    """
    return cut_batch(pixels[None, ..., :3].permute(0, 3, 1, 2), geometry, tiling)[0]


def cut_batch(images: torch.Tensor, geometry: ViewGeometry, tiling: tuple[int, int]) -> torch.Tensor:
    """As [`cut_by_interpolation`], for images `(batch, 3, height, width)` of one size: `(batch, 1 + crops, patches,
    3 · patch²)`."""
    side, patch, device = geometry.side, geometry.patch, images.device
    view_size, step = side * patch, geometry.window * patch
    scale, shift = _normalisation_on(geometry, device)
    planes = images.to(torch.float32, memory_format=torch.contiguous_format)
    views = torch.empty(len(images), 1 + tiling[0] * tiling[1], side * side, 3 * patch**2, device=device)
    for grid, part in (((1, 1), views[:, :1]), (tiling, views[:, 1:])):
        place = geometry.place(tuple(images.shape[2:]), grid)
        resized = F.interpolate(planes, size=(place.height, place.width), mode="bilinear", antialias=True)
        bottom = place.rows * patch - place.top - place.height
        right = place.columns * patch - place.left - place.width
        canvas = F.pad(resized, (place.left, right, place.top, bottom))  # with black, as before normalising
        # (batch, 3, rows, columns, view, view), and each view as patches of pixels
        crops = canvas.unfold(2, view_size, step).unfold(3, view_size, step)
        crops = crops.unflatten(5, (side, patch)).unflatten(4, (side, patch)).permute(0, 2, 3, 4, 6, 5, 7, 1)
        target = part.unflatten(1, grid).unflatten(3, (side, side)).unflatten(5, (patch, patch, 3))
        torch.addcmul(shift, crops, scale, out=target)
    # No pixel may be exactly -1, whose last bit is 0, so all get a 1 there: cheaper than to look for any.
    views.view(torch.int32).bitwise_or_(1)
    return views


@lru_cache(maxsize=8)
def _normalisation_on(geometry: ViewGeometry, device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(values.to(device) for values in geometry.normalisation())


# ---- on a CPU -------------------------------------------------------------------------------------------------------


def cut(pixels: np.ndarray, geometry: ViewGeometry, tiling: tuple[int, int]) -> torch.Tensor:
    """
    The views `(1 + crops, patches, 3 · patch²)` of an image.

    Args:
        pixels (`np.ndarray` of shape `(height, width, 3)`):
            The image, uint8.
        geometry ([`ViewGeometry`]):
            How it is cut.
        tiling (`tuple[int, int]`):
            Rows and columns of crops.
    """
    height, width, _ = pixels.shape
    plan = _plan(geometry, (height, width), tiling)
    # The image, and a black row and column that pixels of the padding are taken from.
    source = torch.empty(height + 1, 3 * (width + 1))
    source.numpy()[:height, :-3] = pixels.reshape(height, -1)
    source[height] = 0
    source[:, -3:] = 0
    torch.addcmul(plan.shift, source, plan.scale, out=source)
    strips = torch.empty(plan.num_strips, 3 * geometry.patch)
    for canvas in plan.canvases:
        rows = source if canvas.rows is None else canvas.rows.of(source)
        table = strips[canvas.strips].view(-1, canvas.columns.shape[0])
        # Column by column, as it lies in memory, a row of the image is a vector.
        resized = table[:-1].T
        torch.addmm(resized, canvas.columns, rows.T, beta=0, out=resized)
        table[-1] = COUNTERWEIGHT
    views = plan.views.of(strips)
    return views.view(1 + tiling[0] * tiling[1], geometry.side**2, 3 * geometry.patch**2)


class _Sums(NamedTuple):
    """Weighted sums of rows of a table, as `embedding_bag` takes them."""

    indices: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor

    def of(self, table: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(
            self.indices, table, self.offsets, mode="sum", per_sample_weights=self.weights, include_last_offset=True
        )


class _Canvas(NamedTuple):
    """
    How a canvas is made. Where that leaves fewer rows, rows are resized first, else by the last sums. Then each row of the
    image has a *strip* for each column of patches: a patch's row of pixels. A last row of strips holds `COUNTERWEIGHT`.
    """

    rows: _Sums | None
    columns: torch.Tensor  # sparse, (3 · width of the canvas, 3 · (width of the image + 1))
    strips: slice  # of the table of strips of all canvases


class _Plan(NamedTuple):
    """All that cutting an image depends on, but the pixels."""

    scale: torch.Tensor  # of each value of a row of the image
    shift: torch.Tensor
    num_strips: int
    canvases: list[_Canvas]
    views: _Sums  # of strips: the rows of pixels of all patches


# A plan of 13 views of 336x336 pixels takes 4 MB, and a millisecond to make.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _plan(geometry: ViewGeometry, size: tuple[int, int], tiling: tuple[int, int]) -> _Plan:
    side, patch = geometry.side, geometry.patch
    made, row_terms, num_strips = {}, [], 0
    for grid in ((1, 1), tiling):
        if grid not in made:  # the only crop of a tiling is a global view once more
            made[grid] = _plan_canvas(geometry, size, grid, num_strips)
            num_strips = made[grid][0].strips.stop
        _, positions, weights = made[grid]
        pixel_rows = _starts(geometry, grid[0]) * patch + np.arange(side * patch).reshape(side, patch)
        shape = (grid[0], 1, side, 1, patch * positions.shape[1])
        row_terms.append((grid, positions[pixel_rows].reshape(shape), weights[pixel_rows].reshape(shape)))
    # A plan's largest arrays are filled in place: to make them once more would take as long as all the rest.
    num_terms = [positions.size * grid[1] * side for grid, positions, _ in row_terms]
    indices, weights = np.empty(sum(num_terms), dtype=np.int32), np.empty(sum(num_terms), dtype=np.float32)
    offsets, first = [], 0
    for (grid, positions, of_row), count in zip(row_terms, num_terms, strict=True):
        view_columns = (_starts(geometry, grid[1]) + np.arange(side, dtype=np.int32)[:, None]).reshape(
            1, grid[1], 1, side, 1
        )
        shape = (grid[0], grid[1], side, side, positions.shape[-1])
        np.add(positions, view_columns, out=indices[first : first + count].reshape(shape), casting="same_kind")
        weights[first : first + count].reshape(shape)[...] = of_row
        offsets.append(np.arange(first, first + count, positions.shape[-1] // patch, dtype=np.int32))
        first += count
    offsets = np.append(np.concatenate(offsets), np.int32(first))
    views = _Sums(*map(torch.from_numpy, (indices, offsets, weights)))
    scale, shift = (values.repeat(size[1] + 1) for values in geometry.normalisation())
    canvases = [canvas for canvas, _, _ in made.values()]
    return _Plan(scale, shift - COUNTERWEIGHT, num_strips, canvases, views)


def _starts(geometry: ViewGeometry, num_views: int) -> np.ndarray:
    """Where views start along an axis, in patches: `(views, 1, 1)`, int32."""
    return np.arange(num_views, dtype=np.int32).reshape(-1, 1, 1) * np.int32(geometry.window)


def _plan_canvas(
    geometry: ViewGeometry, size: tuple[int, int], tiling: tuple[int, int], first_strip: int
) -> tuple[_Canvas, np.ndarray, np.ndarray]:
    """A canvas whose strips begin at `first_strip`, and the strips in its first column that each of its rows of pixels is
    a sum of, with their weights, both `(rows, terms)`."""
    (height, width), place, patch = size, geometry.place(size, tiling), geometry.patch
    positions, weights = _resize_axis(width, place.width, place.left, place.columns * patch)
    by_channel = 3 * positions[:, None] + np.arange(3)[:, None]  # (pixels, 3, terms)
    columns = _sparse(by_channel.reshape(-1, positions.shape[1]), np.repeat(weights, 3, axis=0))
    with warnings.catch_warnings():
        # Once a process, and of no use to whoever cuts an image.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state", category=UserWarning)
        columns = torch.sparse_csr_tensor(
            *(columns.offsets, columns.indices, columns.weights),
            size=(3 * len(positions), 3 * (width + 1)),
            check_invariants=False,
        )

    positions, weights = _resize_axis(height, place.height, place.top, place.rows * patch)
    rows, num_rows = None, height + 1
    if place.height < height:
        inside = slice(place.top, place.top + place.height)
        black = np.full_like(positions[:1], height), np.eye(1, positions.shape[1], dtype=np.float32)
        rows = _sparse(np.append(positions[inside], black[0], axis=0), np.append(weights[inside], black[1], axis=0))
        num_rows = place.height + 1
        positions, weights = _resize_axis(place.height, place.height, place.top, place.rows * patch)
    num_strips = (num_rows + 1) * place.columns
    # The counterweight comes last.
    positions = np.append(positions, np.full((len(positions), 1), num_rows), axis=1) * place.columns
    weights = np.append(weights, np.ones((len(weights), 1), dtype=np.float32), axis=1)
    canvas = _Canvas(rows, columns, slice(first_strip, first_strip + num_strips))
    return canvas, (first_strip + positions).astype(np.int32), weights


def _resize_axis(source: int, target: int, start: int, canvas: int) -> tuple[np.ndarray, np.ndarray]:
    """
    For each pixel along an axis of a canvas, the pixels of the source that it is a sum of, and their weights, both
    `(canvas, terms)`, where the source is resized to `target` pixels from `start` on. Outside of these, all is taken from
    the pixel behind the source, which is black.
    """
    inside_positions, inside_weights = _triangle_filter(source, target)
    num_terms = inside_positions.shape[1]
    positions = np.full((canvas, num_terms), source)
    weights = np.zeros((canvas, num_terms), dtype=np.float32)
    weights[:, 0] = 1
    positions[start : start + target] = inside_positions
    weights[start : start + target] = inside_weights
    return positions, weights


def _triangle_filter(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and weights `(target, terms)` of bilinear resizing with antialiasing, rounded as torch rounds them: in a
    large image, another rounding of the centres alone would show in the fifth digit of the pixels."""
    scale = np.float32(source / target)
    support = max(scale, np.float32(1))
    centers = (scale * (np.arange(target) + 0.5)).astype(np.float32)
    # Reaches from a center less the support to the center plus the support, and both are rounded to whole pixels.
    first = np.maximum(((centers - support).astype(np.float64) + 0.5).astype(int), 0)
    end = np.minimum(((centers + support).astype(np.float64) + 0.5).astype(int), source)
    positions = first[:, None] + np.arange((end - first).max())
    distances = ((positions - centers[:, None]).astype(np.float32) + np.float32(0.5)) / support
    weights = np.where(positions < end[:, None], np.maximum(1 - np.abs(distances), 0), 0).astype(np.float32)
    num_terms = 1 + weights.any(axis=0).nonzero()[0].max()
    weights /= weights.sum(axis=1, keepdims=True)
    return np.minimum(positions, source - 1)[:, :num_terms], weights[:, :num_terms]


def _sparse(positions: np.ndarray, weights: np.ndarray) -> _Sums:
    """Sums of the terms whose weight is not zero."""
    is_term = weights != 0
    offsets = np.concatenate([[0], is_term.sum(axis=1).cumsum()])
    arrays = (positions[is_term].astype(np.int32), offsets.astype(np.int32), weights[is_term])
    return _Sums(*map(torch.from_numpy, arrays))

"""Image processor of Molmo: one global view and overlapping crops of an image, cut into patches."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import ImagesKwargs

from ..images import oriented_size, rgb_pixels, stored_pixels
from .knob_space import DEFAULT_TIER_CROPS
from .view_cutting import PADDED_VIEW_VALUE, ViewGeometry, cut, cut_on_device, upload, view_masks


DROPPED_POSITION = -100
"""Marks a pooled patch in `image_input_idx` that has no token."""


class MolmoImagesKwargs(ImagesKwargs, total=False):
    """Settings of [`MolmoImageProcessor`] that `from_pretrained` may override."""

    base_image_input_size: list[int]
    image_patch_size: int
    image_token_length_h: int
    image_token_length_w: int
    max_crops: int
    overlap_margins: list[int]
    image_padding_mask: bool


class MolmoImageProcessor(BaseImageProcessor):
    r"""
    Turns images into what Molmo's vision tower reads: a global view of the whole image, then overlapping crops, row by
    row, of the image enlarged or reduced to a tiling of crops. The aspect ratio is kept and the rest is padded. The
    settings and their names are those of the published `preprocessor_config.json`; the defaults are MolmoE-1B's.

    The overlap of two neighbouring crops gives each of them context, but enters the sequence once: every crop but the
    first of a row (column) drops `overlap_margins[0]` patches on its left (top), every crop but the last drops
    `overlap_margins[1]` on its right (bottom).

    Args:
        base_image_input_size (`list[int]`, *optional*, defaults to `[336, 336]`):
            Height and width of a view in pixels. Views are square.
        image_patch_size (`int`, *optional*, defaults to 14):
            Side of a patch in pixels.
        image_token_length_h (`int`, *optional*, defaults to 12):
            Rows of tokens to which the connector pools a view.
        image_token_length_w (`int`, *optional*, defaults to 12):
            Columns of tokens to which the connector pools a view.
        max_crops (`int`, *optional*, defaults to 12):
            Most crops of an image, the global view apart.
        overlap_margins (`list[int]`, *optional*, defaults to `[4, 4]`):
            Patches that a crop drops on its left (top) and right (bottom) side. Both are multiples of the pooling
            (2 where 24 patches are pooled to 12 tokens), so that no pooled patch is shared by two crops.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to subtract `image_mean` and divide by `image_std`. Pixels range from 0 to 1 before that.
        image_mean (`list[float]`, *optional*, defaults to CLIP's):
            Mean of each channel.
        image_std (`list[float]`, *optional*, defaults to CLIP's):
            Standard deviation of each channel.
        image_padding_mask (`bool`, *optional*, defaults to `True`):
            Whether to return `image_masks`.

    Raises:
        ValueError: If the sizes do not fit each other: views that are not square or not made of whole patches, patches
            that cannot be pooled to the tokens evenly, margins that leave no window or cut through a pooled patch.
    """

    model_input_names = ["pixel_values", "image_masks", "image_input_idx"]
    valid_kwargs = MolmoImagesKwargs

    def __init__(
        self,
        base_image_input_size: Sequence[int] = (336, 336),
        image_patch_size: int = 14,
        image_token_length_h: int = 12,
        image_token_length_w: int = 12,
        max_crops: int = 12,
        overlap_margins: Sequence[int] = (4, 4),
        do_normalize: bool = True,
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        image_padding_mask: bool = True,
        **kwargs,
    ):
        # The published folder names remote code that this class stands in for: it must not be saved again.
        kwargs.pop("auto_map", None)
        kwargs.pop("image_processor_type", None)
        super().__init__(**kwargs)
        self.base_image_input_size = list(base_image_input_size)
        self.image_patch_size = image_patch_size
        self.image_token_length_h = image_token_length_h
        self.image_token_length_w = image_token_length_w
        self.max_crops = max_crops
        self.overlap_margins = list(overlap_margins)
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.image_padding_mask = image_padding_mask
        self._validate_sizes()

    def _validate_sizes(self) -> None:
        if len(self.base_image_input_size) != 2 or len(set(self.base_image_input_size)) != 1:
            raise ValueError(
                f"`base_image_input_size` is {self.base_image_input_size}: views are square, give the same number of "
                "pixels twice."
            )
        view_size = self.base_image_input_size[0]
        if self.image_patch_size < 1 or view_size < 1 or view_size % self.image_patch_size:
            raise ValueError(
                f"`base_image_input_size` is {self.base_image_input_size} with an `image_patch_size` of "
                f"{self.image_patch_size}: a view must be made of whole patches."
            )
        tokens = self.image_token_length_h
        if tokens != self.image_token_length_w or tokens < 1 or self._view_patches % tokens:
            raise ValueError(
                f"`image_token_length_h` and `image_token_length_w` are {tokens} and {self.image_token_length_w} for "
                f"views of {self._view_patches}x{self._view_patches} patches: both must be the same divisor of "
                f"{self._view_patches}."
            )
        if self.max_crops < 1:
            raise ValueError(f"`max_crops` is {self.max_crops}: an image has at least one crop.")
        if len(self.overlap_margins) != 2 or any(
            margin < 0 or margin % self._pooling for margin in self.overlap_margins
        ):
            raise ValueError(
                f"`overlap_margins` is {self.overlap_margins}: give two multiples of the pooling ({self._pooling} "
                "patches), since neighbouring crops share their overlap out in whole pooled patches."
            )
        if sum(self.overlap_margins) >= self._view_patches:
            raise ValueError(
                f"`overlap_margins` is {self.overlap_margins} in views of {self._view_patches} patches: nothing is left "
                f"between the margins, their sum must be below {self._view_patches}."
            )

    @property
    def _view_patches(self) -> int:
        """Patches on a side of a view."""
        return self.base_image_input_size[0] // self.image_patch_size

    @property
    def _pooling(self) -> int:
        """Patches on a side of a pooled patch."""
        return self._view_patches // self.image_token_length_h

    @property
    def _window_patches(self) -> int:
        """Patches from the start of a crop to the start of its neighbour."""
        return self._view_patches - sum(self.overlap_margins)

    def _canvas_patches(self, tiling: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches of the image that a tiling cuts into crops."""
        rows, columns = tiling
        margins = sum(self.overlap_margins)
        return rows * self._window_patches + margins, columns * self._window_patches + margins

    def tier_range(self, tier: str, tier_crops: Mapping[str, Sequence[int]] | None = None) -> tuple[int, int]:
        """
        Fewest and most crops of a tier in `tier_crops` (`DEFAULT_TIER_CROPS` by default), capped by the checkpoint's
        `max_crops`.

        Raises:
            ValueError: If the tier is unknown or starts above `max_crops`.
        """
        tier_crops = DEFAULT_TIER_CROPS if tier_crops is None else tier_crops
        if tier not in tier_crops:
            raise ValueError(f"`tier` is {tier!r}: the tiers are {', '.join(map(repr, tier_crops))}.")
        fewest, most = tier_crops[tier]
        if not 1 <= fewest <= most:
            raise ValueError(
                f"tier {tier!r} has the crop range {[fewest, most]}: give [fewest, most], 1 or more each."
            )
        if fewest > self.max_crops:
            raise ValueError(
                f"tier {tier!r} starts at {fewest} crops but the checkpoint's `max_crops` is {self.max_crops}: "
                "use a cheaper tier or lower its range in `tier_crops`."
            )
        return fewest, min(most, self.max_crops)

    def select_tiling(self, height: int, width: int, min_crops: int, max_crops: int) -> tuple[int, int]:
        """
        The tiling (rows and columns) of at least `min_crops` and at most `max_crops` crops whose aspect ratio is
        nearest to the image's: the one that makes max(a, b) / min(a, b) of the two ratios smallest, so that an image
        and its transpose get transposed tilings. On a tie: fewer crops, then fewer rows.

        Raises:
            ValueError: If the range of crops is empty.
        """
        if not 1 <= min_crops <= max_crops:
            raise ValueError(f"no tiling has {min_crops} to {max_crops} crops: give [fewest, most], 1 or more each.")
        return _select_tiling(height, width, min_crops, max_crops)

    def fit_tiling(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        """The tiling (rows and columns) of at most `max_crops` crops that the published preprocessing chooses: the one
        that needs the least enlargement of the image, or, where the image is larger than every tiling, the least
        reduction."""
        margins = sum(self.overlap_margins) * self.image_patch_size
        return _fit_tiling(height - margins, width - margins, self._window_patches * self.image_patch_size, max_crops)

    def choose_tiling(
        self,
        height: int,
        width: int,
        max_crops: int | None = None,
        tier: str | None = None,
        tier_crops: Mapping[str, Sequence[int]] | None = None,
    ) -> tuple[int, int]:
        """
        The tiling (rows and columns of crops) of an image at a tier ([`~MolmoImageProcessor.select_tiling`]) or,
        without a tier, of at most `max_crops` crops ([`~MolmoImageProcessor.fit_tiling`]).

        Args:
            height (`int`), width (`int`):
                Size of the image in pixels.
            max_crops (`int`, *optional*, defaults to the checkpoint's `max_crops`):
                Most crops, where no tier is given.
            tier (`str`, *optional*):
                Tier of the image.
            tier_crops (`dict[str, tuple[int, int]]`, *optional*, defaults to `DEFAULT_TIER_CROPS`):
                Crop range of each tier.

        Raises:
            ValueError: If the image is empty, both `max_crops` and `tier` are given, or one of them is not allowed.
        """
        if height < 1 or width < 1:
            raise ValueError(f"the image has {height}x{width} pixels: give an image with at least one pixel.")
        if tier is not None and max_crops is not None:
            raise ValueError(f"both `tier` ({tier!r}) and `max_crops` ({max_crops}) are given: give one of them.")
        if tier is not None:
            return self.select_tiling(height, width, *self.tier_range(tier, tier_crops))
        max_crops = self.max_crops if max_crops is None else max_crops
        if max_crops < 1:
            raise ValueError(f"`max_crops` is {max_crops}: an image has at least one crop.")
        return self.fit_tiling(height, width, max_crops)

    def token_grids(self, tiling: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of patch tokens, of the global view and of the image in this tiling."""
        rows, columns = self._canvas_patches(tiling)
        global_grid = (self.image_token_length_h, self.image_token_length_w)
        return global_grid, (rows // self._pooling, columns // self._pooling)

    def count_image_tokens(self, tiling: Sequence[int]) -> int:
        """Tokens that stand for an image in this tiling: for each of the two grids a start token, the patch tokens, a
        column token after each row, and an end token."""
        return sum(rows * (columns + 1) + 2 for rows, columns in self.token_grids(tiling))

    def image_input_idx(self, tiling: Sequence[int]) -> torch.Tensor:
        """Where each pooled patch goes among the tokens of its image: `(1 + rows * columns, tokens of a view)`, int64,
        counted from the image's first token, -100 for a pooled patch that its crop drops."""
        return self._image_input_idx(tuple(tiling), torch.device("cpu")).clone()

    def _image_input_idx(self, tiling: tuple[int, int], device: torch.device) -> torch.Tensor:
        """As [`~MolmoImageProcessor.image_input_idx`], on a device, and kept: not to be written to."""
        margins = tuple(margin // self._pooling for margin in self.overlap_margins)
        return _token_positions(self.image_token_length_h, margins, tiling, device)

    def preprocess(
        self,
        images: Image.Image | Sequence[Image.Image],
        max_crops: int | None = None,
        tier: str | Sequence[str] | None = None,
        tier_crops: Mapping[str, Sequence[int]] | None = None,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
    ) -> BatchFeature:
        """
        Cuts images into views of patches.

        Args:
            images (`PIL.Image.Image` or `Sequence[PIL.Image.Image]`):
                Images of any mode. They are turned as their EXIF orientation says; transparent ones are put on white.
            max_crops (`int`, *optional*, defaults to the checkpoint's `max_crops`):
                Most crops of an image; the tiling is chosen as in the published preprocessing.
            tier (`str` or `Sequence[str]`, *optional*):
                Tier of all images, or of each. The image is enlarged or reduced to the tier's tiling.
            tier_crops (`dict[str, tuple[int, int]]`, *optional*, defaults to `DEFAULT_TIER_CROPS`):
                Crop range of each tier.
            return_tensors (`str`, *optional*):
                `"np"` for NumPy arrays; the outputs are PyTorch tensors otherwise.
            device (`str` or `torch.device`, *optional*, defaults to the CPU):
                Where images are resized and cut, and where the outputs are but `tilings`. A GPU takes the image's pixels
                from pinned memory, and the host waits for nothing. Its pixel values differ from the CPU's by less than
                1e-3.

        Returns:
            [`~transformers.BatchFeature`] with
            - `pixel_values` (images, views, patches, 3 · patch²), float32: pixels of a patch in (row, column, channel)
              order; the global view comes first; views that pad the batch are -1;
            - `image_masks` (images, views, patches), float32: the share of each patch that is not padding. The masks
              of the crops come first and a row of -1 ends them, as the released weights expect; -1 also pads;
            - `image_input_idx` (images, views, tokens of a view), int64: where each pooled patch goes, counted from the
              image's first token; -100 where it is dropped, and in views that pad;
            - `tilings` (images, 2), int64: rows and columns of crops.

        Raises:
            ValueError: If an image is empty or not a PIL image, or its pixels cannot be read, the number of tiers is not
                that of the images, or a tier or `max_crops` is not allowed.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        tiers = [tier] * len(images) if tier is None or isinstance(tier, str) else list(tier)
        if not images:
            raise ValueError("`images` is empty: give at least one image.")
        if len(tiers) != len(images):
            raise ValueError(
                f"{len(tiers)} tiers are given for {len(images)} images: give one tier, or one per image."
            )

        device = torch.device("cpu" if device is None else device)
        tilings, views, masks = [], [], []
        for index, (image, image_tier) in enumerate(zip(images, tiers, strict=True)):
            if not isinstance(image, Image.Image):
                raise ValueError(
                    f"image {index} of the batch is a {type(image).__name__}, not a PIL image: convert it, e.g. with "
                    "PIL.Image.open or PIL.Image.fromarray."
                )
            try:
                width, height = oriented_size(image)
                tiling = self.choose_tiling(height, width, max_crops, image_tier, tier_crops)
                its_views, its_masks = self.cut(image, tiling, device)
            except ValueError as error:
                raise ValueError(f"image {index} of the batch: {error}") from error
            tilings.append(tiling)
            views.append(its_views)
            masks.append(its_masks)

        image_input_idx = [self._image_input_idx(tiling, device) for tiling in tilings]
        data = {
            # A single image is not padded: its 13 views of 336x336 pixels are 18 MB.
            "pixel_values": views[0][None] if len(views) == 1 else _pad(views, PADDED_VIEW_VALUE),
            "image_masks": _pad(masks, PADDED_VIEW_VALUE),
            "image_input_idx": _pad(image_input_idx, DROPPED_POSITION),
            "tilings": torch.tensor(tilings),
        }
        if not self.image_padding_mask:
            del data["image_masks"]
        return BatchFeature(data, tensor_type=return_tensors)

    def cut(
        self, image: Image.Image, tiling: tuple[int, int], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What [`~MolmoImageProcessor.preprocess`] gives for one image in a tiling: its pixel values and its masks, on a
        device. The masks are kept for others of its size: not to be written to.
        """
        geometry = self.view_geometry
        width, height = oriented_size(image)
        masks = _masks(geometry, (height, width), tuple(tiling), device)
        if device.type == "cpu":
            return cut(rgb_pixels(image), geometry, tuple(tiling)), masks
        return cut_on_device(upload(stored_pixels(image), device), geometry, tuple(tiling)), masks

    @property
    def view_geometry(self) -> ViewGeometry:
        """How images are cut."""
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else ([0.0] * 3, [1.0] * 3)
        return ViewGeometry(
            self._view_patches, self.image_patch_size, self._window_patches, mean=tuple(mean), std=tuple(std)
        )


def _pad(tensors: list[torch.Tensor], value: float) -> torch.Tensor:
    """Stacks a new batch, and fills up shorter samples with `value`."""
    return pad_sequence(tensors, batch_first=True, padding_value=value)


# What follows depends on few sizes, and is asked for in each request, or for each tier of each request.


@lru_cache(maxsize=64)
def _masks(
    geometry: ViewGeometry, size: tuple[int, int], tiling: tuple[int, int], device: torch.device
) -> torch.Tensor:
    return view_masks(geometry, size, tiling).to(device)


@lru_cache(maxsize=64)
def _token_positions(
    length: int, margins: tuple[int, int], tiling: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """
    See [`MolmoImageProcessor.image_input_idx`].

    Args:
        length (`int`):
            Pooled patches on a side of a view.
        margins (`tuple[int, int]`):
            Pooled patches that a crop drops on its left (top) and right (bottom) side.
        tiling (`tuple[int, int]`):
            Rows and columns of crops.
        device (`torch.device`):
            Where the positions are to be.
    """
    first_of_crops = length * (length + 1) + 2
    grids = [_grid_positions(length, margins, (1, 1), 0), _grid_positions(length, margins, tiling, first_of_crops)]
    return torch.cat(grids).to(device)


def _grid_positions(length: int, margins: tuple[int, int], tiling: tuple[int, int], first: int) -> torch.Tensor:
    """Positions (crops, tokens of a view) of the pooled patches of one grid whose start token is at `first`."""
    left, right = margins
    cell = torch.arange(length)
    axes = []
    for num_crops in tiling:
        crop = torch.arange(num_crops)[:, None]
        position = crop * (length - left - right) + cell  # (crops along the axis, length)
        kept = ((crop == 0) | (cell >= left)) & ((crop == num_crops - 1) | (cell < length - right))
        axes.append((position, kept))
    (row, row_kept), (column, column_kept) = axes
    row_length = int(column[-1, -1]) + 2  # and the column token that ends it
    positions = first + 1 + row[:, None, :, None] * row_length + column[None, :, None, :]
    kept = row_kept[:, None, :, None] & column_kept[None, :, None, :]
    return torch.where(kept, positions, DROPPED_POSITION).reshape(-1, length * length)


@lru_cache(maxsize=1024)
def _select_tiling(height: int, width: int, min_crops: int, max_crops: int) -> tuple[int, int]:
    def distance(tiling: tuple[int, int]) -> tuple[float, int, int]:
        rows, columns = tiling
        # Quotients of integers are rounded correctly, so equal ratios compare as equal.
        mismatch = max(width * rows / (height * columns), height * columns / (width * rows))
        return mismatch, rows * columns, rows

    return min((tiling for tiling in _tilings(max_crops) if tiling[0] * tiling[1] >= min_crops), key=distance)


@lru_cache(maxsize=1024)
def _fit_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """The tiling of at most `max_crops` windows of pixels for an image of this size, its margins left out."""
    tilings = _tilings(max_crops)
    windows = np.array(tilings, dtype=np.float32) * window
    # The published code compares what is left of the image without the margins, in float32. An image no larger than
    # the margins gives scales that are infinite or negative, and one crop.
    with np.errstate(divide="ignore"):
        scale = (windows / np.array([height, width], dtype=np.float32)).min(axis=1)
    enlarging = scale >= 1
    best = np.where(enlarging, scale, np.inf).argmin() if enlarging.any() else scale.argmax()
    return tilings[best]


def _tilings(max_crops: int) -> list[tuple[int, int]]:
    """All (rows, columns) of at most `max_crops` crops, those of fewer crops first, then those of fewer rows."""
    tilings = [(rows, columns) for rows in range(1, max_crops + 1) for columns in range(1, max_crops // rows + 1)]
    return sorted(tilings, key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))

"""Splits, and parts of a split that share no image."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Image


ROLES = {"train2014": "train", "val": "validation", "val2014": "validation"}
"""Names under which files and repositories have the splits `train` and `validation`."""

_SPLIT = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?:(?P<start>\d+)%)?:(?:(?P<stop>\d+)%)?\])?")


@dataclass(frozen=True)
class SplitPart:
    """
    A split, or the part of it that a share of its images makes.

    Args:
        name (`str`):
            Name of the split.
        start, stop (`int`, *optional*, default to 0 and 100):
            Where the part begins and ends, in percent of the images.
    """

    name: str
    start: int = 0
    stop: int = 100

    @classmethod
    def parse(cls, split: str) -> "SplitPart":
        """Reads "train", or "train[:90%]" and the like; anything else is a `ValueError`."""
        match = _SPLIT.fullmatch(split)
        part = match and cls(match["name"], int(match["start"] or 0), int(match["stop"] or 100))
        if not part or not 0 <= part.start < part.stop <= 100:
            raise ValueError(
                f"the split '{split}' is not understood: give a name such as 'train', or a part of its images, such "
                "as 'train[:90%]' and 'train[90%:]'."
            )
        return part

    @property
    def is_whole(self) -> bool:
        """Whether the part is all of the split."""
        return (self.start, self.stop) == (0, 100)

    def overlaps(self, other: "SplitPart") -> bool:
        """Whether the two share images: splits of different names do not, but `val2014` is `validation`."""
        same_split = ROLES.get(self.name, self.name) == ROLES.get(other.name, other.name)
        return same_split and max(self.start, other.start) < min(self.stop, other.stop)

    def contains(self, image_key: str) -> bool:
        """
        Whether an image belongs to the part: its place in percent is the leading 53 bits of the SHA-256 of its key,
        read as a number in [0, 1), times 100. So all questions on an image are on the same side of a boundary, in
        every run and source.
        """
        digest = hashlib.sha256(image_key.encode()).digest()
        return self.start <= 100 * (int.from_bytes(digest[:8], "big") >> 11) / 2**53 < self.stop


def select_part(dataset: Dataset, part: SplitPart, name: str) -> Dataset:
    """The rows of a data set whose images belong to a part, see [`is_image_in_part`]."""
    if part.is_whole:
        return dataset
    images = dataset.select_columns("image").cast_column("image", Image(decode=False))
    return select_rows(dataset, [row for row, image in enumerate(images) if is_image_in_part(image, part)], part, name)


def select_rows(dataset: Dataset, rows: Sequence[int], part: SplitPart, name: str) -> Dataset:
    """The rows of a data set that were found to be in a part, of which there must be some."""
    if not rows:
        raise ValueError(f"data set '{name}' has no image in the part {part.start}% to {part.stop}% of '{part.name}'.")
    return dataset.select(rows)


def is_image_in_part(row: Mapping[str, Any], part: SplitPart) -> bool:
    """
    Whether a row's image (not decoded, bytes, or a path) belongs to a part, by what tells images apart: its bytes, or, where
    a row has the path of a file, the file's name.
    """
    image = row["image"]
    encoded = image if isinstance(image, bytes) else isinstance(image, Mapping) and image["bytes"]
    if encoded:
        return part.contains(hashlib.sha256(encoded).hexdigest())
    path = image["path"] if isinstance(image, Mapping) else image
    return part.contains(Path(path or "").name)

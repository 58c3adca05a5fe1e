"""Rows of a data set as samples, whose images are decoded when they are looked at."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from .images import ImageError, decode_image


class Sample(dict):
    """
    A row of a data set whose image is decoded each time that it is read, and not kept: a list of samples takes the memory
    of their files. Once a sample's features and outcomes are known, its image is not read at all.

    Args:
        row (`dict`):
            Columns of the row, with the image still encoded (`datasets.Image(decode=False)`).
    """

    def __init__(self, row: Mapping[str, Any]):
        super().__init__({column: value for column, value in row.items() if column != "image"})
        self._encoded_image = row["image"]

    @cached_property
    def image_id(self) -> str | None:
        """Names the image by its content, so that questions about one image are known as such: the first 16 hexadecimal
        digits of the SHA-256 of the encoded image. `None` where there is no image."""
        if self._encoded_image is None:
            return None
        content = self._encoded_image["bytes"]
        if content is None:
            content = Path(self._encoded_image["path"]).read_bytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def __missing__(self, column: str) -> Any:
        if column != "image":
            raise KeyError(column)
        try:
            return decode_image(self._encoded_image)
        except ImageError as error:
            raise ValueError(f"sample '{self['sample_id']}', column 'image': {error}.") from error


def read_samples(dataset: Dataset) -> list[Sample]:
    """
    All rows of a data set as samples.

    Args:
        dataset (`datasets.Dataset`):
            Has a column `image`; others may be any.
    """
    return [Sample(row) for row in dataset.cast_column("image", Image(decode=False))]

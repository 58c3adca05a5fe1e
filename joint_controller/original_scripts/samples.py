"""The samples of recorded results: their images, where these are at hand, and their division into splits."""

import hashlib
import re
from pathlib import Path

import pyarrow
from datasets import Dataset, Image

from ..data.schema import SPLITS
from .recorded_results import dataset_name_of_sample


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

HELD_OUT_SHARE = 0.1
"""Share of the recorded samples that is kept for validation, and again for the test; one sample at least."""

# COCO's files are named COCO_val2014_000000001000.jpg or 000000001000.jpg, its annotations speak of image 1000.
_PADDED_NUMBER = re.compile(r"(?:COCO_[a-z]+\d{4}_)?0*(\d+)")


def find_images(samples: Dataset, image_dir: str | Path) -> Dataset:
    """
    Looks up the images of recorded samples by the id that the data set gives them: a file `<image_id>.jpg` (or another
    image suffix), or one that COCO names by the number (`COCO_val2014_000000001000.jpg`).

    Args:
        samples ([`~datasets.Dataset`]):
            Samples of [`RecordedResults`].
        image_dir (`str` or `Path`):
            Folder of image files, searched with all that is below it. Where it has a folder with the name of a data set
            (`text_vqa` or `text-vqa`), images of that data set are looked up there alone.

    Returns:
        [`~datasets.Dataset`]: The samples with the paths of their images, and a column `defect` that says why there is none
        (null where there is one), as [`~joint_controller.data.keep_good_rows`] reads it.
    """
    image_dir = Path(image_dir)
    if not image_dir.is_dir():
        raise FileNotFoundError(f"`image_dir` '{image_dir}' does not exist: give the folder of the images.")
    found_in: dict[Path, dict[str, list[Path]]] = {}
    paths: list[str | None] = []
    defects: list[str | None] = []
    for sample_id, image_id in zip(samples["sample_id"], samples["image_id"], strict=True):
        name = dataset_name_of_sample(sample_id)
        candidates = (image_dir / name, image_dir / name.replace("_", "-"))
        folder = next((candidate for candidate in candidates if candidate.is_dir()), image_dir)
        if folder not in found_in:
            found_in[folder] = _index_images(folder)
        files = [] if image_id is None else found_in[folder].get(_image_key(Path(image_id).stem), [])
        if len(files) > 1:
            raise ValueError(
                f"sample '{sample_id}' has image '{image_id}', which is both '{files[0]}' and '{files[1]}': keep one, or "
                f"put the images of each data set into a folder of its own ('{image_dir / name}')."
            )
        paths.append(str(files[0]) if files else None)
        defects.append(None if files else f"image: there is no file for image '{image_id}' in '{folder}'")
    if not any(paths):
        raise ValueError(
            f"`image_dir` '{image_dir}' has no image of any of the {len(samples)} samples; the first is "
            f"'{samples['image_id'][0]}': name the files by image id (<image_id>.jpg), or train without `image_dir`."
        )
    samples = samples.remove_columns("image").add_column("image", paths).cast_column("image", Image())
    return samples.add_column("defect", pyarrow.array(defects, pyarrow.string()))


def _index_images(folder: Path) -> dict[str, list[Path]]:
    index: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            index.setdefault(_image_key(file.stem), []).append(file)
    return index


def _image_key(name: str) -> str:
    match = _PADDED_NUMBER.fullmatch(name)
    return name if match is None else match[1]


def split_samples(samples: Dataset) -> dict[str, Dataset]:
    """
    Divides recorded samples, which name no splits, into `train`, `validation` and `test`. Samples are ordered by the
    SHA-256 of their id; the first tenth (one at least) is for validation, the next tenth (one at least) for the test, the
    rest for training. So the division is the same in every run over the same samples, whatever the seed. Each split is in
    that order, too, so that its beginning is a random part of it.
    """
    if len(samples) < len(SPLITS):
        raise ValueError(
            f"{len(samples)} recorded sample(s) cannot be divided into {', '.join(SPLITS)}: record more of them."
        )
    digests = [hashlib.sha256(sample_id.encode()).digest() for sample_id in samples["sample_id"]]
    order = sorted(range(len(samples)), key=digests.__getitem__)
    held_out = max(1, int(HELD_OUT_SHARE * len(samples)))
    return {
        "train": samples.select(order[2 * held_out :]),
        "validation": samples.select(order[:held_out]),
        "test": samples.select(order[held_out : 2 * held_out]),
    }

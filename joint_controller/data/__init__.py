"""Visual question answering data in one schema, and synthetic scenes."""

from .built_in import SCENE_FAMILIES, SceneFamily
from .images import ImageError, decode_image
from .loading import load_vqa_dataset, load_vqa_datasets, load_vqa_parts
from .registry import VQA_DATASETS, VQADataset
from .row_checks import BadRow, SkippedRows, keep_good_rows
from .samples import Sample, read_samples
from .scenes import QUESTION_TYPES, Scene, generate_scene, scene_seed, vocabulary
from .schema import ENCODED_FEATURES, FEATURES, SPLITS
from .sources import read_source
from .splits import SplitPart
from .streaming import stream_vqa_datasets, take_rows


__all__ = [
    "ENCODED_FEATURES",
    "FEATURES",
    "QUESTION_TYPES",
    "SCENE_FAMILIES",
    "SPLITS",
    "VQA_DATASETS",
    "BadRow",
    "ImageError",
    "Sample",
    "Scene",
    "SceneFamily",
    "SkippedRows",
    "SplitPart",
    "VQADataset",
    "decode_image",
    "generate_scene",
    "keep_good_rows",
    "load_vqa_dataset",
    "load_vqa_datasets",
    "load_vqa_parts",
    "read_samples",
    "read_source",
    "scene_seed",
    "stream_vqa_datasets",
    "take_rows",
    "vocabulary",
]

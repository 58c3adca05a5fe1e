"""Visual question answering data in one schema, synthetic scenes, and latency budgets."""

from .budgets import draw_budget
from .loading import load_vqa_dataset, load_vqa_datasets
from .scenes import (
    QUESTION_TYPES,
    Scene,
    SceneObject,
    SceneQuestion,
    SceneSign,
    generate_scene,
    scene_seed,
    vocabulary,
)
from .schema import FEATURES, SPLITS, validate_dataset


__all__ = [
    "FEATURES",
    "QUESTION_TYPES",
    "SPLITS",
    "Scene",
    "SceneObject",
    "SceneQuestion",
    "SceneSign",
    "draw_budget",
    "generate_scene",
    "load_vqa_dataset",
    "load_vqa_datasets",
    "scene_seed",
    "validate_dataset",
    "vocabulary",
]

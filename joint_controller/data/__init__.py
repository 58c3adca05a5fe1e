"""Visual question answering data in one schema, synthetic scenes, and latency budgets."""

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


__all__ = [
    "QUESTION_TYPES",
    "Scene",
    "SceneObject",
    "SceneQuestion",
    "SceneSign",
    "generate_scene",
    "scene_seed",
    "vocabulary",
]

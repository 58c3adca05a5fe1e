"""
Accuracy of an executor at many settings, on packed questions. Answers of the embedded executor's data sets are one word,
so greedy decoding is right exactly where the answer and then the end of the sequence are the likeliest tokens, which one
forward pass tells. `MolmoExecutor` gives the same answers, for any data, one question and one token at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch.utils.data import default_collate

from ...knobs import KnobSpace
from .. import MolmoForConditionalGeneration, MolmoProcessor
from .packing import AskedImage, PackedLayout, Packer, segment_logits


@dataclass(frozen=True)
class Run:
    """What an evaluation runs at: the tier, the experts per token and the blocks."""

    tier: str
    top_k: int
    active_blocks: tuple[int, ...]


@torch.inference_mode()
def measure_accuracy(
    model: MolmoForConditionalGeneration,
    processor: MolmoProcessor,
    asked_images: Sequence[AskedImage],
    runs: Sequence[Run],
    batch_size: int,
) -> dict[Run, dict[str, float]]:
    """Share of the questions of each type that greedy decoding answers at each run: the answer and then the end of the
    sequence are the likeliest tokens. `batch_size` images are in a batch."""
    packer = Packer(processor, max(len(asked.questions) for asked in asked_images))
    by_size: dict[tuple[int, int], list[AskedImage]] = {}
    for asked in asked_images:
        by_size.setdefault(asked.image.size, []).append(asked)
    correct: dict[Run, list[bool]] = {run: [] for run in runs}
    for size, of_size in by_size.items():
        packed = default_collate([packer.pack(asked) for asked in of_size])
        for tier in dict.fromkeys(run.tier for run in runs):
            layout = PackedLayout.of(packer, size, tier, model.device)
            for start in range(0, len(of_size), batch_size):
                images, segments, labels = (
                    packed[name][start : start + batch_size].to(model.device)
                    for name in ("images", "segments", "labels")
                )
                masks = layout.image_masks.expand(len(images), -1, -1)
                features = model.get_image_features(layout.cut(images), masks)
                for run in runs:
                    if run.tier == tier:
                        logits = segment_logits(
                            model,
                            layout,
                            segments,
                            image_features=features,
                            active_blocks=run.active_blocks,
                            top_k=run.top_k,
                        )
                        right = ((logits.argmax(-1) == labels) | (labels == -100)).all(-1)
                        correct[run] += right[(labels != -100).any(-1)].tolist()
    types = [
        question_type for of_size in by_size.values() for asked in of_size for _, _, question_type in asked.questions
    ]
    return {
        run: {
            question_type: fmean(ok for ok, of in zip(answers, types, strict=True) if of == question_type)
            for question_type in sorted(set(types))
        }
        for run, answers in correct.items()
    }


def score_blocks(
    model: MolmoForConditionalGeneration,
    processor: MolmoProcessor,
    data: Mapping[str, Sequence[AskedImage]],
    batch_size: int,
) -> dict[int, float]:
    """Importance of each block: the accuracy that leaving it out costs at the otherwise full setting, averaged over
    all question types of all data sets. The same scores as those of
    [`~molmo.blocks.importance.measure_accuracy_drop`], which asks one question at a time."""
    full = KnobSpace.from_dict(model.config.knob_space).full
    every_block = tuple(range(model.config.text_config.num_hidden_layers))
    left = [every_block, *(every_block[:block] + every_block[block + 1 :] for block in every_block)]
    runs = [Run(full["tier"], full["top_k"], blocks) for blocks in left]
    accuracies = {run: [] for run in runs}
    for asked_images in data.values():
        for run, by_type in measure_accuracy(model, processor, asked_images, runs, batch_size).items():
            accuracies[run] += by_type.values()
    with_all, *without = (fmean(accuracies[run]) for run in runs)
    return {block: with_all - accuracy for block, accuracy in enumerate(without)}


def measure_settings(
    model: MolmoForConditionalGeneration,
    processor: MolmoProcessor,
    data: Mapping[str, Sequence[AskedImage]],
    importance: Mapping[int, float],
    batch_size: int,
) -> list[dict[str, Any]]:
    """Accuracy at every setting of the checkpoint's knob space, where the blocks that run are chosen by `importance`:
    rows of `dataset`, the knobs, `accuracy` (of all question types, on average) and `accuracy_by_type`."""
    ranking = sorted(importance, key=lambda block: (block != 0, -importance[block]))
    space = KnobSpace.from_dict(model.config.knob_space)
    runs = {
        setting: Run(setting["tier"], setting["top_k"], tuple(sorted(ranking[: setting["num_blocks"]])))
        for setting in space
    }
    results = []
    for name, asked_images in data.items():
        accuracies = measure_accuracy(model, processor, asked_images, list(runs.values()), batch_size)
        for setting, run in runs.items():
            by_type = accuracies[run]
            accuracy = fmean(by_type.values())
            results.append({"dataset": name, **setting, "accuracy": accuracy, "accuracy_by_type": by_type})
    return results


def measure_knobs(
    model: MolmoForConditionalGeneration,
    processor: MolmoProcessor,
    data: Mapping[str, Sequence[AskedImage]],
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Accuracy of each question type at each value of the knobs `tier` and `top_k`, e.g. `"tier=low"`, the other knobs
    at full: what there is to see before blocks have scores. Compiled modules run eagerly here."""
    space = KnobSpace.from_dict(model.config.knob_space)
    every_block = tuple(range(model.config.text_config.num_hidden_layers))
    runs = {f"tier={tier}": Run(tier, space.full["top_k"], every_block) for tier in space.values["tier"]}
    runs |= {f"top_k={top_k}": Run(space.full["tier"], top_k, every_block) for top_k in space.values["top_k"][:-1]}
    accuracies: dict[str, dict[str, float]] = {name: {} for name in runs}
    with torch.compiler.set_stance("force_eager"):
        for asked_images in data.values():
            measured = measure_accuracy(model.eval(), processor, asked_images, list(runs.values()), batch_size)
            for name, run in runs.items():
                accuracies[name] |= measured[run]
    model.train()
    return accuracies

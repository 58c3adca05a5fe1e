"""The model card of an executor that `joint-controller train-executor` trained: all its numbers come from the run."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ...data import SCENE_FAMILIES


HEADER = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- molmo
- mixture-of-experts
- visual-question-answering
---

# Embedded executor

A MolmoE of {millions:.1f} million parameters that answers one-word questions about small pictures: the default executor of
`joint-controller`, so that the whole package runs on a laptop. It has the architecture, the checkpoint layout, the
preprocessing and the prompt of `allenai/MolmoE-1B-0924` at a toy size, and the same three knobs: image tier, experts per
token, blocks that run. It was trained at the full setting only, as published checkpoints are: no step saw
fewer experts or blocks. Steps at all three tiers stand for images of all resolutions.

**Intended use**: trying out, testing and demonstrating controllers of `joint-controller`. **Limits**: it knows the words and
pictures of its data sets and nothing else; answers are one word; the shapes of its training images are those listed below;
it was not trained to refuse, so it answers any question with some word it knows.

```python
from joint_controller.executor import load_executor

executor = load_executor("embedded")
```

## Data

- **scenes**: the generator in `joint_controller/data/scenes.py`: 2 to 6 objects and often a sign or two on a varied
  background, {sizes} pixels, {num_types} types of question. Training scenes have seeds of their
  own, which the splits `train`, `validation` and `test` do not contain: a controller is trained on scenes that its executor
  never saw.
- **scenes_transfer**: the same in {transfer_sizes} pixels, with {num_transfer_types} other types of question, for
  what a controller makes of shapes and types that it was not trained on. The executor was trained on them too.
- **easy_vqa**: the PyPI package `easy-vqa` (MIT licence): 64×64 pixels, one shape; its own test split. The executor was
  trained on the same training images that a controller is trained on.

Accuracies below are measured on the test splits: {counts}.
Weights are rounded to bfloat16 and computed with in float32. An answer counts where greedy decoding gives exactly the word
and then ends. Averages are over question types.
"""

TRAINING = """
## Training

`joint-controller train-executor --config recipes/embedded_executor/train.yaml`, seed {seed}, on {hardware}: \
{max_steps:,} steps in
{minutes:.1f} minutes (compilation included), torch {versions[torch]}, transformers {versions[transformers]}. \
A step has {images_per_step} images
of one size, in {easy_vqa_share:.0%} of the steps of easy-vqa, each with up to {questions_per_image} questions packed into one \
sequence. Scenes are drawn up to {largest_size_scale:g} times as
large at first and as large as those of the test after {curriculum_share:.0%} of the steps. \
A GPU's sums depend on their order: another
run with this seed ends with slightly other weights and numbers.

{start}Routers of a model this small come to send nearly all of a token's weight to one expert, so that `top_k` would cost and save
nothing. A loss therefore keeps the weights of the chosen experts worth {effective_experts:g} experts or more \
(the exponential of their
entropy).
"""


CONTINUED = """It started from the weights in `{initial_model}` (see the recipe).

"""


def build_executor_card(
    results: Mapping[str, Any], log: Sequence[Mapping[str, Any]], importance: Mapping[int, float]
) -> str:
    """The model card of a trained executor, Markdown with the metadata block of the Hub: from the content of
    `results.json`, the lines of `log.jsonl`, and the score of each block."""
    args = results["arguments"]
    *others, last = [
        f"{sum(questions['count'] for questions in types.values()):,} questions of {name}"
        for name, types in results["questions"].items()
    ]
    counts = f"{', '.join(others)} and {last}"
    sections = [
        HEADER.format(
            millions=results["num_parameters"] / 1e6,
            counts=counts,
            sizes=_sizes("scenes"),
            num_types=len(SCENE_FAMILIES["scenes"].question_types),
            transfer_sizes=_sizes("scenes_transfer"),
            num_transfer_types=len(SCENE_FAMILIES["scenes_transfer"].question_types),
        ),
        "## Results at a glance\n",
        _overview(results),
        TRAINING.format(
            **args,
            **results,
            minutes=results["training_seconds"] / 60,
            start="" if args["initial_model"] is None else CONTINUED.format(**args),
        ),
        "Validation accuracy during training, the other knobs at full:\n",
        _learning_curve(log, results["questions"]),
        "\nAll arguments:\n",
        _table(["argument", "value"], [[f"`{name}`", f"`{value}`"] for name, value in args.items()]),
        "\n## Importance of blocks\n\nAccuracy lost on the validation splits when a block is left out at the full setting. "
        "Block 0 always runs, then those with the highest scores.\n",
        _table(["block", *map(str, importance)], [["score", *(f"{score:.3f}" for score in importance.values())]]),
        "\n## Accuracy at every setting\n",
        *(_all_settings(results, name) for name in results["questions"]),
    ]
    return "\n".join(sections)


def _sizes(family: str) -> str:
    *others, last = [f"{width}×{height}" for width, height in SCENE_FAMILIES[family].image_sizes]
    return f"{', '.join(others)} or {last}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _overview(results: Mapping[str, Any]) -> str:
    """Each question type at the full setting, and with one knob at its lowest value, next to the baseline."""
    rows = []
    for name, types in results["questions"].items():
        settings = [row for row in results["settings"] if row["dataset"] == name]
        full = settings[-1]
        lowered = [
            next(row for row in settings if all(row[other] == full[other] for other in others))
            for others in (("top_k", "num_blocks"), ("tier", "top_k"), ("tier", "num_blocks"))
        ]
        columns = [full, *lowered]
        baseline = fmean(questions["baseline"] for questions in types.values())
        rows.append([f"**{name}**", "", f"{baseline:.3f}", *(f"**{row['accuracy']:.3f}**" for row in columns)])
        for question_type, questions in types.items():
            accuracies = (f"{row['accuracy_by_type'][question_type]:.3f}" for row in columns)
            rows.append([question_type, str(questions["count"]), f"{questions['baseline']:.3f}", *accuracies])
    low, few, narrow = lowered
    header = [
        "questions",
        "number",
        "most frequent answer",
        "full setting",
        f"tier={low['tier']}",
        f"num_blocks={few['num_blocks']}",
        f"top_k={narrow['top_k']}",
    ]
    return _table(header, rows)


def _learning_curve(log: Sequence[Mapping[str, Any]], questions: Mapping[str, Mapping[str, Any]]) -> str:
    evaluations = [line for line in log if "accuracy" in line]
    columns = [(name, knob) for name in questions for knob in evaluations[0]["accuracy"]]
    rows = []
    for line in evaluations:
        accuracies = [
            fmean(accuracy for of, accuracy in line["accuracy"][knob].items() if of in questions[name])
            for name, knob in columns
        ]
        rows.append([f"{line['step']:,}", f"{line['loss']:.3f}", *(f"{accuracy:.3f}" for accuracy in accuracies)])
    return _table(["step", "loss", *(f"{name}, {knob}" for name, knob in columns)], rows)


def _all_settings(results: Mapping[str, Any], name: str) -> str:
    types = list(results["questions"][name])
    rows = [
        [
            row["tier"],
            str(row["top_k"]),
            str(row["num_blocks"]),
            f"**{row['accuracy']:.3f}**",
            *(f"{row['accuracy_by_type'][question_type]:.3f}" for question_type in types),
        ]
        for row in results["settings"]
        if row["dataset"] == name
    ]
    return f"### {name}\n\n" + _table(["tier", "top_k", "num_blocks", "average", *types], rows)

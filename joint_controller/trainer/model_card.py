"""The card of a controller: what it decides, what it was trained on, and how good it is."""

from collections.abc import Sequence

from ..knobs import KnobSpace


def format_model_card(
    knob_space: KnobSpace,
    source: str | None = None,
    dataset_names: Sequence[str] = (),
    latencies: str | None = None,
    evaluation: str | None = None,
) -> str:
    """
    The README of a controller's folder.

    Args:
        knob_space ([`KnobSpace`]):
            Knobs that the controller decides.
        source (`str`, *optional*):
            What it was trained for, in words, e.g. the name of the executor.
        dataset_names (`Sequence[str]`, *optional*):
            Data sets that it was trained on.
        latencies (`str`, *optional*):
            What latencies are, in words, e.g. `"those of whole requests, estimated"`.
        evaluation (`str`, *optional*):
            Results, as Markdown.

    Returns:
        `str`: Markdown with the metadata that the Hub reads.
    """
    knobs = "\n".join(
        f"| `{knob.name}` | {', '.join(map(str, knob.values))} | stage {knob.stage} | {knob.description} |"
        for knob in knob_space.knobs
    )
    trained_on = f", on {', '.join(dataset_names)}" if dataset_names else ""
    measured = f"Latencies are {latencies}, at batch 1.\n" if latencies else ""
    results = f"\n## Evaluation\n\n{evaluation}\n" if evaluation else ""
    return f"""---
library_name: joint-controller
pipeline_tag: visual-question-answering
tags:
- joint-controller
- grpo
---

# Controller for {source or "a vision-language model"}

Sets {len(knob_space.knobs)} knobs of a frozen vision-language model for each question, so that the answer is as good as its
latency budget allows. Trained by GRPO{trained_on}. {measured}
| knob | values | decided by | what it sets |
| --- | --- | --- | --- |
{knobs}

```python
from joint_controller import JointPipeline

pipeline = JointPipeline.from_pretrained("path/to/this/folder", model_path="path/to/the/executor")
result = pipeline(image, "What is on the table?", latency_budget_ms=200)
result.answer, result.setting, result.latency_ms
```
{results}"""

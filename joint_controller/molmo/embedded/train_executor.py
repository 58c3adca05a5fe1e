"""
Trains a small Molmo from scratch: the executor that ships with this package.

```bash
joint-controller train-executor --config recipes/embedded_executor/train.yaml
```
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import set_seed

from ...scripts import ScriptParser, run_script
from .. import MolmoForConditionalGeneration
from ..blocks.importance_files import save_importance
from .arguments import TrainExecutorArguments
from .card import build_executor_card
from .data import describe_questions, load_splits
from .experts import use_dense_experts
from .model import build_model, build_processor, start_from
from .packed_accuracy import measure_settings, score_blocks
from .training import train


def make_parser() -> ScriptParser:
    return ScriptParser([TrainExecutorArguments])


def main(args: TrainExecutorArguments) -> None:
    output_dir = Path(args.output_dir)
    if (output_dir / "log.jsonl").exists():
        raise ValueError(f"output_dir '{output_dir}' holds another training: choose another folder or remove it.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.compile and device.type != "cuda":
        raise ValueError("`compile` is set but there is no GPU: train with `--compile false`.")
    if not 1 <= args.effective_experts <= args.top_k:
        raise ValueError(f"`effective_experts` is {args.effective_experts}: give 1 to `top_k`, which is {args.top_k}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    processor = build_processor(args)
    model = build_model(args, processor)
    if args.initial_model is not None:
        start_from(model, processor, args.initial_model)
    model.to(device)
    use_dense_experts(model)
    started = time.monotonic()
    train(args, model, processor, load_splits("validation", args.eval_images))

    training_seconds = round(time.monotonic() - started)

    # What is measured is what users get: weights rounded to bfloat16, computed with in float32.
    model = MolmoForConditionalGeneration.from_pretrained(output_dir, dtype=torch.float32).to(device).eval()
    use_dense_experts(model)
    validation, test = (load_splits(split, args.test_images) for split in ("validation", "test"))
    importance = score_blocks(model, processor, validation, args.eval_batch_size)
    provenance = {
        "measured_as": "accuracy lost when the block is left out at the full setting, averaged over question types",
        "data": "validation splits of scenes and easy_vqa",
        "images_per_data_set": args.test_images,
    }
    save_importance(output_dir / "importance.json", importance, provenance)
    results = {
        "arguments": asdict(args),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "training_seconds": training_seconds,
        "num_parameters": model.num_parameters(),
        "questions": {name: describe_questions(asked_images) for name, asked_images in test.items()},
        "settings": measure_settings(model, processor, test, importance, args.eval_batch_size),
    }
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    log = [json.loads(line) for line in (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    (output_dir / "README.md").write_text(build_executor_card(results, log, importance), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_script("train-executor", make_parser, main))

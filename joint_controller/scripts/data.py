"""
Shows what a recipe would train on: samples, answers, images, and how long the executor's inputs will be.

```bash
joint-controller data --config recipes/easy_vqa/train.yaml --output_dir outputs/easy_vqa_data
```

Takes the recipes of `joint-controller train`. Loads no weights. Prints tables, and writes them and a picture of 25 samples
to the output folder.
"""

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console

from ..data import SkippedRows, load_vqa_parts, stream_vqa_datasets, take_rows
from ..data.contact_sheet import draw_contact_sheet
from ..data.report import DataPart, make_tables, to_json
from ..data.statistics import describe_dataset
from ..evaluation.scoring import check_metrics
from ..executor import EMBEDDED, load_input_counter
from ..images import convert_to_rgb
from ..knobs import parse_knob_values
from ..original_scripts.arguments import OriginalArguments
from ..trainer import JointGRPOConfig
from . import run_script
from .data_arguments import check_splits, open_skipped_rows
from .train import TrainArguments, make_parser


REPORT_FILE = "data_report.md"
JSON_FILE = "data_report.json"
CONTACT_SHEET_FILE = "contact_sheet.png"

NUM_EXAMPLES = 5
NUM_PICTURED = 25

NUM_STREAMED = 1000
"""Training samples that are read of a stream, unless the recipe asks for fewer."""


def main(script_args: TrainArguments, training_args: JointGRPOConfig, original_args: OriginalArguments):
    if original_args.results_dir is not None:
        raise ValueError(
            "this command shows data sets, not recorded results (`results_dir`): leave it out and give `dataset_names`."
        )
    check_splits(script_args)
    model_path = script_args.model_path or EMBEDDED
    counter = load_input_counter(model_path, parse_knob_values(script_args.knob_values), script_args.max_new_tokens)
    output_dir = Path(training_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    skipped_rows = open_skipped_rows(script_args, output_dir)
    datasets = _load_datasets(script_args, training_args.seed, skipped_rows)
    for dataset in datasets.values():
        check_metrics(dataset["metric"], dataset["sample_id"])
    parts = [
        DataPart(name, split, role, describe_dataset(dataset, counter))
        for (name, role, split), dataset in datasets.items()
    ]
    training_datasets = [dataset for (_, role, _), dataset in datasets.items() if role == "train"]
    num_train = sum(map(len, training_datasets))
    samples = _draw_samples(training_datasets, training_args.seed)

    tables = make_tables(parts, samples[:NUM_EXAMPLES], counter.max_prompt_tokens, skipped_rows)
    if script_args.streaming:
        tables[0].note = f"Training samples are a stream: these are its first {num_train:,}."
    console = Console()
    for table in tables:
        console.print(table.to_rich(), "")
    title = f"{len(samples)} of {num_train:,} training samples: {', '.join(script_args.dataset_names)}"
    draw_contact_sheet(samples, title).save(output_dir / CONTACT_SHEET_FILE)
    sections = ["# What the recipe trains on", f"![Training samples]({CONTACT_SHEET_FILE})"]
    sections += [table.to_markdown() for table in tables]
    (output_dir / REPORT_FILE).write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    report = {
        "model_path": model_path,
        "knob_space": counter.knob_space.to_dict(),
        "max_prompt_tokens": counter.max_prompt_tokens,
        "max_new_tokens": script_args.max_new_tokens,
        "parts": [to_json(part) for part in parts],
        "examples": [
            {column: value for column, value in sample.items() if column != "image"}
            for sample in samples[:NUM_EXAMPLES]
        ],
        "skipped_rows": [asdict(bad) for bad in skipped_rows or ()],
    }
    (output_dir / JSON_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"{REPORT_FILE}, {JSON_FILE} and {CONTACT_SHEET_FILE} are in '{output_dir}'.")


def _load_datasets(
    args: TrainArguments, seed: int, skipped_rows: SkippedRows | None
) -> dict[tuple[str, str, str], Dataset]:
    """Samples by name, role and split, data set after data set."""
    roles = {
        "train": (args.train_split, args.max_train_samples),
        "validation": (args.eval_split, args.max_eval_samples),
        "test": (args.test_split, args.max_test_samples),
    }
    datasets = {}
    for role, (split, max_samples) in roles.items():
        if role == "train" and args.streaming:
            loaded = _read_streams(args, seed, skipped_rows)
        else:
            loaded = load_vqa_parts(args.dataset_names, split, max_samples, seed, args.dataset_weights, skipped_rows)
        datasets.update({(name, role, split): dataset for name, dataset in loaded.items()})
    return {key: datasets[key] for name in args.dataset_names for key in datasets if key[0] == name}


def _read_streams(args: TrainArguments, seed: int, skipped_rows: SkippedRows | None) -> dict[str, Dataset]:
    """The first training samples of each data set, as many as its share of the mixture."""
    num_samples = min(args.max_train_samples or NUM_STREAMED, NUM_STREAMED)
    weights = args.dataset_weights or [1] * len(args.dataset_names)
    return {
        name: take_rows(
            stream_vqa_datasets([name], args.train_split, seed=seed, skipped_rows=skipped_rows),
            max(1, round(num_samples * weight / sum(weights))),
        )
        for name, weight in zip(args.dataset_names, weights, strict=True)
    }


def _draw_samples(datasets: list[Dataset], seed: int) -> list[dict[str, Any]]:
    """Samples that training would use, with images as the executor sees them."""
    rows = [(dataset, row) for dataset in datasets for row in range(len(dataset))]
    samples = [dataset[row] for dataset, row in random.Random(seed).sample(rows, min(NUM_PICTURED, len(rows)))]
    return [{**sample, "image": convert_to_rgb(sample["image"])} for sample in samples]


if __name__ == "__main__":
    sys.exit(run_script("data", make_parser, main))

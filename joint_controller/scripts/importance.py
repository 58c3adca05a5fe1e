"""Scores the executor's blocks by what leaving each of them out costs, on held-out training data."""

import datetime
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..evaluation.scoring import score_answer
from ..executor import MolmoExecutor, measure_importance, save_importance
from . import ScriptParser, run_script
from .data_arguments import DatasetArguments, load_split, open_skipped_rows


@dataclass(kw_only=True)
class ImportanceArguments(DatasetArguments):
    """
    Arguments of `joint-controller importance`, beside those of [`DatasetArguments`].

    Args:
        output_path (`str`):
            JSON file to write.
        model_path (`str`, *optional*, defaults to `"embedded"`):
            The executor.
        dataset_split (`str`, *optional*, defaults to `"validation"`):
            Split of the data sets.
        max_samples (`int`, *optional*, defaults to 1000):
            Samples to measure on.
        max_new_tokens (`int`, *optional*, defaults to 16):
            Most tokens of an answer.
        batch_size (`int`, *optional*, defaults to 32):
            Most prompts that are answered at once.
        seed (`int`, *optional*, defaults to 42):
            Chooses the samples.
    """

    output_path: str = field(metadata={"help": "JSON file to write the scores to. Must not exist."})
    model_path: str = field(
        default="embedded",
        metadata={"help": "Model folder or Hub repository of the executor; 'embedded' is the one that ships here."},
    )
    dataset_split: str = field(
        default="validation",
        metadata={"help": "Split of the data sets. Training data held out, not the test split: scores set the knobs."},
    )
    max_samples: int = field(default=1000, metadata={"help": "Samples to measure on."})
    max_new_tokens: int = field(default=16, metadata={"help": "Most tokens of an answer."})
    batch_size: int = field(default=32, metadata={"help": "Most prompts that are answered at once."})
    seed: int = field(default=42, metadata={"help": "Seed that chooses the samples."})


def make_parser() -> ScriptParser:
    return ScriptParser([ImportanceArguments])


def main(args: ImportanceArguments) -> dict[int, float]:
    """Measures and writes the scores. Returns the score of each block."""
    output_path = Path(args.output_path)
    if output_path.exists():
        raise FileExistsError(f"`output_path` '{output_path}' exists: choose another path, or delete the file first.")
    executor = MolmoExecutor.from_pretrained(
        args.model_path, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size
    )
    skipped_rows = open_skipped_rows(args, output_path.parent)
    dataset = load_split(args, args.dataset_split, args.max_samples, args.seed, skipped_rows)
    scores, accuracy = measure_importance(executor, dataset, score_answer, progress=True)
    provenance = {
        "method": "accuracy lost when the block is left out, other knobs full",
        "dataset_names": args.dataset_names,
        "dataset_weights": args.dataset_weights,
        "dataset_split": args.dataset_split,
        "num_samples": len(dataset),
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "accuracy": accuracy,
        "executor": args.model_path,
        "executor_fingerprint": executor.fingerprint,
        "date": datetime.date.today().isoformat(),
    }
    save_importance(output_path, scores, provenance)

    table = Table(title=f"Accuracy with all blocks: {accuracy:.3f} ({len(dataset)} samples)", title_justify="left")
    table.add_column("block", justify="right")
    table.add_column("accuracy lost without it", justify="right")
    for block in sorted(scores, key=scores.get, reverse=True):
        table.add_row(str(block), f"{scores[block]:+.4f}")
    console = Console()
    if skipped_rows:
        console.print(skipped_rows.summary())
    console.print(table)
    console.print(f"Scores are in '{output_path}'. An executor folder takes them as its importance.json.")
    return scores


if __name__ == "__main__":
    sys.exit(run_script("importance", make_parser, main))

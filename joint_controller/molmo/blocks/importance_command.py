"""Scores the executor's blocks, and searches for the blocks that can be left out together."""

import datetime
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.table import Table
from transformers.hf_argparser import HfArg

from ...data import SkippedRows
from ...data.loading import load_vqa_parts
from ...evaluation.scoring import check_metrics, score_answer
from ...executor import executor_shape, load_executor
from ...scripts import ScriptParser, run_script
from ...scripts.data_arguments import DatasetArguments, open_skipped_rows
from ...version import __version__
from ..executor import MolmoExecutor
from .block_accuracy import BlockSetAccuracies
from .block_comparison import (
    ALL_DATASETS,
    compare_block_selections,
    draw_comparison,
    format_comparison_markdown,
    format_comparison_table,
)
from .block_search import max_sets_searched, search_blocks
from .block_selection import BlockSelection
from .importance import BlockScores, measure_accuracy_drop, measure_hidden_change
from .importance_files import save_importance


IMPORTANCE = "importance"
HIDDEN_CHANGE = "hidden_change"
SEARCHED_FILE = "searched_blocks.json"
COMPARISON = "comparison"
ACCURACIES = "accuracies"

METHODS = {
    IMPORTANCE: "accuracy lost when the block is left out, other knobs full",
    HIDDEN_CHANGE: "change of the hidden state: mean over tokens of 1 - cosine similarity of the block's input and output "
    "(block influence, Men et al., 2024, arXiv:2403.03853)",
}

DESCRIPTION = f"""
Scores the executor's blocks, and searches for those that can be left out together.

Scores: every block by the accuracy that leaving it out costs, and, as a proxy that needs no answers, by how much it
changes the hidden state; each with its standard error and a 95 % interval. In the output folder:

  {IMPORTANCE}.json, {IMPORTANCE}_DATASET.json        by accuracy drop, on all samples and on those of each data set
  {HIDDEN_CHANGE}.json, {HIDDEN_CHANGE}_DATASET.json  by the change of the hidden state

Search, with `--beam_width`: blocks are left out one after another, and the best sets of each size are followed. What is
found is compared on another split with blocks by either score, with the first blocks and with random ones:

  {COMPARISON}.md, {COMPARISON}.json, {COMPARISON}.png  accuracy at each number of blocks
  {SEARCHED_FILE}                            the sets that were found, with the scores

Use: any of these scores, and {SEARCHED_FILE}, are what other commands take as `--importance_path`, and a model folder
as its importance.json. Where a file has a set for a number of blocks, that set runs, else the blocks with the highest scores.

Answers are kept in {ACCURACIES}/ as they come: after an interruption, the same command continues.

examples:
  joint-controller importance --config recipes/embedded_executor/importance.yaml
  joint-controller importance --config recipes/embedded_executor/search_blocks.yaml
  joint-controller importance --model_path path/to/MolmoE-1B-0924 --dataset_names text_vqa --output_dir outputs/text_vqa
"""


@dataclass(kw_only=True)
class ImportanceArguments(DatasetArguments):
    """Arguments of `joint-controller importance`, besides those of [`DatasetArguments`]."""

    output_dir: str = HfArg(default="", help="Folder for scores, report and answers. Required.")
    model_path: str = HfArg(
        default="embedded",
        help="Model folder or Hub repository of the executor; 'embedded' is the one that ships here.",
    )
    dataset_split: str = HfArg(
        default="validation",
        help="Split to score and search on. Training data held out, not the test split: scores set the knobs.",
    )
    max_samples: int = HfArg(default=1000, help="Samples to score and search on, of all data sets.")
    max_new_tokens: int = HfArg(default=16, help="Most tokens of an answer.")
    batch_size: int = HfArg(default=32, help="Most prompts that are answered at once.")
    beam_width: int | None = HfArg(
        default=None,
        help="Search for sets of blocks: sets of each size that are followed while blocks are left out one after another. "
        "1 is a greedy search. Default: no search and no comparison.",
    )
    num_blocks_values: list[int] | None = HfArg(
        default=None,
        help="Numbers of blocks to search sets for and to compare at. Default: those of the executor's configuration, but "
        "the largest.",
    )
    comparison_split: str = HfArg(
        default="test", help="Split on which the search is compared. Not that of the search."
    )
    max_comparison_samples: int = HfArg(default=1000, help="Samples to compare on, of all data sets.")
    num_random_sets: int = HfArg(default=20, help="Random sets of each size in the comparison.")
    seed: int = HfArg(default=42, help="Seed of the samples, of the random sets and of the bootstrap intervals.")


def make_parser() -> ScriptParser:
    return ScriptParser([ImportanceArguments], description=DESCRIPTION)


@dataclass
class MeasuredSplit:
    """The samples of a split, the rows of each data set's samples, and what is known of the executor's blocks on
    them."""

    split: str
    samples: Dataset
    rows_of: dict[str, range]
    accuracies: BlockSetAccuracies

    def full_accuracies(self) -> dict[str, float]:
        """Accuracy of all blocks, on each data set and on all of them."""
        [measured] = self.accuracies.measure([self.accuracies.all_blocks])
        return {ALL_DATASETS: float(measured.mean())} | {
            name: float(measured[rows].mean()) for name, rows in self.rows_of.items()
        }


def main(args: ImportanceArguments) -> None:
    """Measures, searches and compares, and writes what was found."""
    output_dir = Path(args.output_dir)
    _check(args, output_dir)
    model_type, _ = executor_shape(args.model_path)
    if model_type != MolmoExecutor.model_type:
        raise ValueError(f"`model_path` '{args.model_path}' is a {model_type}: blocks are scored for Molmo alone.")
    executor: MolmoExecutor = load_executor(
        args.model_path, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size
    )
    counts = _counts_to_search(args, executor)
    console = Console()
    skipped_rows = open_skipped_rows(args, output_dir)
    scored = _load(args, executor, args.dataset_split, args.max_samples, skipped_rows)
    num_layers = scored.accuracies.num_layers
    num_answers = (1 + num_layers) * len(scored.samples)
    if counts:
        # Loaded now: what is wrong with it should not come to light after the search.
        held_out = _load(args, executor, args.comparison_split, args.max_comparison_samples, skipped_rows)
        seen = set(scored.accuracies.sample_ids).intersection(held_out.accuracies.sample_ids)
        if seen:
            raise ValueError(
                f"{len(seen)} samples, '{min(seen)}' among them, are both in `dataset_split` '{scored.split}' and in "
                f"`comparison_split` '{held_out.split}': compare on samples that the search has not seen."
            )
        num_answers += max_sets_searched(num_layers, min(counts), args.beam_width) * len(scored.samples)
        num_answers += (1 + (4 + args.num_random_sets) * len(counts)) * len(held_out.samples)
    if skipped_rows:
        console.print(skipped_rows.summary())
    console.print(
        f"This takes {'at most ' if counts else ''}{num_answers} answers and {len(scored.samples)} prefills."
    )

    scores = {
        HIDDEN_CHANGE: measure_hidden_change(executor, scored.accuracies.encoded, args.seed, progress=True),
        IMPORTANCE: measure_accuracy_drop(scored.accuracies, args.seed),
    }
    searched = search_blocks(scored.accuracies, counts, args.beam_width) if counts else None
    if searched:
        _compare(args, executor, held_out, scores, searched, console)
    _save_scores(args, executor, scored, scores, searched)
    console.print(_format_scores(scores, scored))
    file = SEARCHED_FILE if searched else f"{IMPORTANCE}.json"
    console.print(f"What was found is in '{output_dir}'. To use it: `--importance_path {output_dir / file}`.")


def _check(args: ImportanceArguments, output_dir: Path) -> None:
    if not args.output_dir:
        raise ValueError("`--output_dir` is missing.")
    last_file = output_dir / f"{IMPORTANCE}.json"
    if last_file.exists():
        raise FileExistsError(
            f"'{last_file}' exists: name another `output_dir`, or delete the file (answers in {ACCURACIES}/ are used again)."
        )
    if args.beam_width is None:
        if args.num_blocks_values is not None:
            raise ValueError("`num_blocks_values` is for a search: give `beam_width`, too.")
        return
    if args.beam_width < 1:
        raise ValueError(f"`beam_width` is {args.beam_width}: give 1 (a greedy search) or more.")
    if args.num_random_sets < 2:
        raise ValueError(f"`num_random_sets` is {args.num_random_sets}: their spread needs 2 or more.")


def _counts_to_search(args: ImportanceArguments, executor: MolmoExecutor) -> list[int]:
    """Numbers of blocks to search sets for, ascending; none without a search."""
    if args.beam_width is None:
        return []
    num_layers = executor.model.config.text_config.num_hidden_layers
    given = args.num_blocks_values or executor.knob_space["num_blocks"].values
    counts = sorted({count for count in given if count != num_layers})
    if not counts or not 1 <= counts[0] <= counts[-1] < num_layers:
        raise ValueError(
            f"`num_blocks_values` is {list(given)}: there is something to search for from 1 to {num_layers - 1} blocks."
        )
    return counts


def _load(
    args: ImportanceArguments,
    executor: MolmoExecutor,
    split: str,
    max_samples: int,
    skipped_rows: SkippedRows | None,
) -> MeasuredSplit:
    """The samples of a split, data set by data set, so that each can have scores of its own."""
    parts = load_vqa_parts(args.dataset_names, split, max_samples, args.seed, args.dataset_weights, skipped_rows)
    rows_of, start = {}, 0
    for name, part in parts.items():
        if len(part) < 2:
            raise ValueError(
                f"there is {len(part)} sample of '{name}' in '{split}': confidence needs 2 of each data set, raise the number "
                "of samples."
            )
        rows_of[name] = range(start, start + len(part))
        start += len(part)
    samples = concatenate_datasets(list(parts.values()))
    check_metrics(samples["metric"], samples["sample_id"])
    store = Path(args.output_dir) / ACCURACIES
    accuracies = BlockSetAccuracies(executor, samples, score_answer, store, progress=True)
    return MeasuredSplit(split, samples, rows_of, accuracies)


def _compare(
    args: ImportanceArguments,
    executor: MolmoExecutor,
    held_out: MeasuredSplit,
    scores: Mapping[str, BlockScores],
    searched: Mapping[int, Sequence[int]],
    console: Console,
) -> None:
    """Compares what was searched and scored on other samples, and writes and shows the comparison."""
    selections = {"search": searched}
    for method, name in ((IMPORTANCE, "accuracy drop"), (HIDDEN_CHANGE, "hidden change")):
        by_score = BlockSelection(held_out.accuracies.num_layers, scores[method].scores)
        selections[name] = {count: by_score.active_blocks(count) for count in searched}
    rows = compare_block_selections(
        held_out.accuracies, selections, list(searched), held_out.rows_of, args.num_random_sets, args.seed
    )
    full = held_out.full_accuracies()
    provenance = _provenance(args, executor, held_out.split, held_out.rows_of) | {
        "searched_on": args.dataset_split,
        "beam_width": args.beam_width,
        "num_random_sets": args.num_random_sets,
    }
    output_dir = Path(args.output_dir)
    title = f"Blocks of {args.model_path}, chosen on '{args.dataset_split}' and compared on '{held_out.split}'"
    comparison = {"full_accuracy": full, "rows": [asdict(row) for row in rows], "provenance": provenance}
    (output_dir / f"{COMPARISON}.json").write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
    markdown = format_comparison_markdown(rows, full, title, picture=f"{COMPARISON}.png")
    (output_dir / f"{COMPARISON}.md").write_text(markdown, encoding="utf-8")
    draw_comparison(rows, full, output_dir / f"{COMPARISON}.png")
    console.print(format_comparison_table(rows, f"{title}. All blocks: {full[ALL_DATASETS]:.3f}"))


def _save_scores(
    args: ImportanceArguments,
    executor: MolmoExecutor,
    scored: MeasuredSplit,
    scores: Mapping[str, BlockScores],
    searched: Mapping[int, Sequence[int]] | None,
) -> None:
    full = scored.full_accuracies()

    def save(file: str, method: str, dataset: str, block_sets: Mapping[int, Sequence[int]] | None = None) -> None:
        rows_of = scored.rows_of if dataset == ALL_DATASETS else {dataset: scored.rows_of[dataset]}
        found = scores[method].of_samples([row for rows in rows_of.values() for row in rows])
        provenance = _provenance(args, executor, scored.split, rows_of)
        provenance |= {"method": METHODS[method], "accuracy": full[dataset]}
        if block_sets is not None:
            provenance |= {"block_sets": "beam search for the most accurate sets", "beam_width": args.beam_width}
        save_importance(
            Path(args.output_dir) / file, found.scores, provenance, found.standard_errors, found.intervals, block_sets
        )

    for method in scores:
        for dataset in scored.rows_of:
            # "text_vqa=some/folder" becomes "text_vqa".
            name = re.sub(r"[^\w.-]+", "_", dataset.split("=")[0]).strip("_")
            save(f"{method}_{name}.json", method, dataset)
    if searched is not None:
        save(SEARCHED_FILE, IMPORTANCE, ALL_DATASETS, searched)
    save(f"{HIDDEN_CHANGE}.json", HIDDEN_CHANGE, ALL_DATASETS)
    save(f"{IMPORTANCE}.json", IMPORTANCE, ALL_DATASETS)  # the last file: where it is, nothing is missing


def _provenance(
    args: ImportanceArguments, executor: MolmoExecutor, split: str, rows_of: Mapping[str, range]
) -> dict[str, Any]:
    return {
        "num_samples": {name: len(rows) for name, rows in rows_of.items()},
        "dataset_split": split,
        "seed": args.seed,
        "setting": dict(executor.knob_space.full),
        "max_new_tokens": args.max_new_tokens,
        "executor": args.model_path,
        "executor_fingerprint": executor.model_fingerprint,
        "executor_mode": executor.mode,
        "joint_controller_version": __version__,
        "date": datetime.date.today().isoformat(),
    }


def _format_scores(scores: Mapping[str, BlockScores], scored: MeasuredSplit) -> Table:
    accuracy, samples = scored.full_accuracies()[ALL_DATASETS], len(scored.samples)
    table = Table(title=f"Accuracy with all blocks: {accuracy:.3f} ({samples} samples)", title_justify="left")
    for heading in ("block", "accuracy drop", "95 %", "hidden change", "95 %"):
        table.add_column(heading, justify="right")
    drop, change = scores[IMPORTANCE], scores[HIDDEN_CHANGE]
    for block in sorted(drop.scores, key=drop.scores.get, reverse=True):
        table.add_row(
            str(block),
            f"{drop.scores[block]:+.3f}",
            "[{:+.3f}, {:+.3f}]".format(*drop.intervals[block]),
            f"{change.scores[block]:.3f}",
            "[{:.3f}, {:.3f}]".format(*change.intervals[block]),
        )
    return table


if __name__ == "__main__":
    sys.exit(run_script("importance", make_parser, main))

"""The data sets, as the arguments of several scripts name them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset

    from ..data import SkippedRows


SKIPPED_ROWS_FILE = "skipped_rows.jsonl"


@dataclass
class DatasetArguments:
    """
    Arguments that choose data sets and mix them.
    """

    dataset_names: list[str] = field(
        default_factory=lambda: ["easy_vqa", "scenes"],
        metadata={"help": "Data sets: `easy_vqa`, `scenes`, a folder or Parquet files."},
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "One positive number for each data set: its share of the samples; only ratios count. An epoch (a pass) "
            "then ends where a sample would have to be used twice to keep the shares. Default: all samples of all data "
            "sets, or, with a limit, as many of each."
        },
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={
            "help": "Leave out rows that cannot be used (image missing, damaged, too small or too large, no question, no "
            f"answers), count them in the log and list them in `{SKIPPED_ROWS_FILE}` in the output folder. Default: such a "
            "row is an error."
        },
    )


@dataclass
class DataArguments(DatasetArguments):
    """
    Arguments that choose the data to train on, to evaluate on and to test on.
    """

    train_split: str = field(default="train", metadata={"help": "Split of the data sets to train on."})
    eval_split: str = field(
        default="validation", metadata={"help": "Split on which controllers are evaluated and the best one is chosen."}
    )
    test_split: str = field(default="test", metadata={"help": "Split for the table at the end."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Training samples in all, the length of an epoch. Default: all."}
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Validation samples in all, on which the best controller is chosen. Default: all."},
    )
    max_test_samples: int | None = field(
        default=None, metadata={"help": "Test samples in all, for the table at the end. Default: all."}
    )


def open_skipped_rows(args: DatasetArguments, output_dir: str | Path) -> "SkippedRows | None":
    """
    Where a script's bad rows are listed: `skipped_rows.jsonl` in its output folder, written by the main process. `None`,
    which makes them an error, unless `skip_bad_rows` is set.
    """
    from accelerate import PartialState

    from ..data import SkippedRows

    if not args.skip_bad_rows:
        return None
    return SkippedRows(Path(output_dir) / SKIPPED_ROWS_FILE if PartialState().is_main_process else None)


def load_split(
    args: DatasetArguments,
    split: str,
    max_samples: int | None,
    seed: int,
    skipped_rows: "SkippedRows | None" = None,
) -> "Dataset":
    """
    Loads a split of the data sets that are asked for. To be called by all processes: the main one of each machine reads and
    checks the rows first, the others take what it has found.

    Args:
        args ([`DatasetArguments`]):
            Names the data sets and their weights.
        split (`str`):
            Their split.
        max_samples (`int` or `None`):
            At most so many samples in all.
        seed (`int`):
            Chooses samples and their order.
        skipped_rows ([`SkippedRows`], *optional*):
            What [`open_skipped_rows`] gives.

    Raises:
        ValueError: As [`~joint_controller.data.load_vqa_datasets`] does.
    """
    from accelerate import PartialState

    from ..data import load_vqa_datasets

    with PartialState().local_main_process_first():
        return load_vqa_datasets(
            args.dataset_names, split, max_samples, seed, weights=args.dataset_weights, skipped_rows=skipped_rows
        )


def load_data_splits(
    args: DataArguments, seed: int, skipped_rows: "SkippedRows | None" = None
) -> "tuple[Dataset, Dataset, Dataset]":
    """
    Loads what a recipe trains on, evaluates on and tests on.

    Args:
        args ([`DataArguments`]):
            Names data sets, splits and limits.
        seed (`int`):
            Chooses samples and their order.
        skipped_rows ([`SkippedRows`], *optional*):
            What [`open_skipped_rows`] gives.

    Returns:
        `tuple[Dataset, Dataset, Dataset]`: Training, validation and test samples.

    Raises:
        ValueError: As [`~joint_controller.data.load_vqa_datasets`] does.
    """
    train, validation, test = (
        load_split(args, split, max_samples, seed, skipped_rows)
        for split, max_samples in (
            (args.train_split, args.max_train_samples),
            (args.eval_split, args.max_eval_samples),
            (args.test_split, args.max_test_samples),
        )
    )
    return train, validation, test

"""The data sets, as the arguments of several scripts name them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.hf_argparser import HfArg


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..data import SkippedRows


SKIPPED_ROWS_FILE = "skipped_rows.jsonl"


@dataclass
class DatasetArguments:
    """Arguments that choose data sets and mix them."""

    dataset_names: list[str] = HfArg(
        default_factory=lambda: ["easy_vqa", "scenes"],
        help="Data sets: `easy_vqa`, `scenes`, `scenes_transfer`, the name of a published one (from the Hub), `<name>=<path>` for a "
        "published one in a local folder, or the path of a folder written by `save_to_disk` or of Parquet files with "
        "the columns image, question and answers.",
    )
    dataset_weights: list[float] | None = HfArg(
        default=None,
        help="One positive number for each data set: its share of the samples; only ratios count. An epoch is then as "
        "long as it can be without using a sample twice: with n samples in a data set of share s, the smallest n / "
        "s, or the limit that is set. Default: an epoch is all samples of all data sets, or the limit, shared evenly.",
    )
    skip_bad_rows: bool = HfArg(
        default=False,
        help="Leave out rows that cannot be used (image missing, damaged, too small or too large, no question, no "
        f"answers), count them in the log and list them in `{SKIPPED_ROWS_FILE}` in the output folder. Default: such a "
        "row is an error.",
    )


@dataclass
class DataArguments(DatasetArguments):
    """Arguments that choose the data to train on, to evaluate on and to test on."""

    train_split: str = HfArg(
        default="train",
        help="Split of the data sets to train on. `train[:90%%]` is the part with about 90 percent of its images.",
    )
    eval_split: str = HfArg(
        default="validation",
        help="Split on which controllers are evaluated and the best one is chosen. Must not overlap train_split.",
    )
    test_split: str = HfArg(default="test", help="Split for the table at the end. Must not overlap train_split.")
    max_train_samples: int | None = HfArg(
        default=None,
        help="Training samples in all, at most: the length of an epoch. Of a stream, the first. Default: all.",
    )
    max_eval_samples: int | None = HfArg(
        default=None, help="Validation samples in all, on which the best controller is chosen. Default: all."
    )
    max_test_samples: int | None = HfArg(
        default=None, help="Test samples in all, for the table at the end. Default: all."
    )
    streaming: bool = HfArg(
        default=False,
        help="Read training samples while they are trained on, in place of preparing all of them first. Needs "
        "`max_steps`. Each is checked when its turn comes. An epoch is one pass: of several data sets, which take "
        "turns, or, with weights, until the first has run out. Samples are shuffled in a buffer of 1,000, and a "
        "resumed run reads again what it has trained on.",
    )


def check_splits(args: DataArguments) -> None:
    """Refuses to evaluate or test on samples that are trained on, and splits that are not understood."""
    from ..data import SplitPart

    train = SplitPart.parse(args.train_split)
    for field_name, split in (("eval_split", args.eval_split), ("test_split", args.test_split)):
        if train.overlaps(SplitPart.parse(split)):
            raise ValueError(
                f"`train_split` '{args.train_split}' and `{field_name}` '{split}' share images: give splits, or parts of one "
                f"split, that do not overlap, such as '{train.name}[:90%]' and '{train.name}[90%:]'."
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
    Loads a split of the data sets that are asked for, as [`~joint_controller.data.load_vqa_datasets`] does, and checks that
    their metrics exist and can be computed. To be called by all processes: the main one of each machine reads and checks the
    rows first, the others take what it has found.
    """
    from accelerate import PartialState

    from ..data import load_vqa_datasets
    from ..evaluation.scoring import check_metrics

    with PartialState().local_main_process_first():
        dataset = load_vqa_datasets(
            args.dataset_names, split, max_samples, seed, weights=args.dataset_weights, skipped_rows=skipped_rows
        )
    check_metrics(dataset["metric"], dataset["sample_id"])
    return dataset


def load_data_splits(
    args: DataArguments, seed: int, skipped_rows: "SkippedRows | None" = None
) -> "tuple[Dataset | IterableDataset, Dataset, Dataset]":
    """Loads what a recipe trains on (a stream with `streaming`), evaluates on and tests on."""
    from ..data import stream_vqa_datasets

    check_splits(args)
    if args.streaming:
        train = stream_vqa_datasets(
            args.dataset_names, args.train_split, args.max_train_samples, seed, args.dataset_weights, skipped_rows
        )
    else:
        train = load_split(args, args.train_split, args.max_train_samples, seed, skipped_rows)
    validation = load_split(args, args.eval_split, args.max_eval_samples, seed, skipped_rows)
    test = load_split(args, args.test_split, args.max_test_samples, seed, skipped_rows)
    return train, validation, test

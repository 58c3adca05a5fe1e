"""Accuracy of an executor with chosen blocks: each sample is encoded once, and answered once by each set of blocks."""

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from ...executor import ExecutorRequest
from ..executor import MolmoExecutor
from ..executor.encoding import EncodedSample


BLOCK_ACCURACY_FEATURES = Features(
    {
        "sample_id": Value("string"),
        "tier": Value("string"),
        "top_k": Value("int32"),
        "active_blocks": List(Value("int32")),
        "accuracy": Value("float64"),
        "executor_fingerprint": Value("string"),
    }
)
"""Columns of the table of accuracies."""

SECONDS_BETWEEN_SHARDS = 5.0
"""A process that is killed loses the answers of this long at most, or one batch."""


class BlockSetAccuracies:
    """
    Accuracy of each sample with chosen blocks, the other knobs being full. What was measured is kept, in memory and,
    with a `path`, in a folder of Parquet shards, and never measured again: not by a search that was interrupted and
    started anew, nor by one on more samples.

    All samples stay encoded on the executor's device as long as this object lives: about 8 MB each for MolmoE-1B at
    its highest tier in bfloat16.

    Args:
        executor ([`MolmoExecutor`]):
            Executor to measure. Its own choice of blocks is not used.
        samples (`Sequence[dict]`):
            Rows with the columns `sample_id`, `image`, `question`, `answers`, `style` and `metric`.
        score (`Callable[[str, str, Sequence[str]], float]`):
            Accuracy of an answer, given the row's metric, the answer and the reference answers, e.g.
            [`~joint_controller.evaluation.scoring.score_answer`].
        path (`str` or `Path`, *optional*):
            Folder to keep accuracies in, created if missing. Several objects may share it, e.g. for two splits.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over the answers that are missing (never where the output is not a terminal).

    Raises:
        ValueError: If there are no samples, one has no reference answers or another one's id, or the folder holds accuracies
            of another executor.
    """

    def __init__(
        self,
        executor: MolmoExecutor,
        samples: Sequence[Mapping[str, Any]],
        score: Callable[[str, str, Sequence[str]], float],
        path: str | Path | None = None,
        progress: bool = False,
    ):
        if len(samples) == 0:
            raise ValueError("there are no samples to measure blocks on: give at least one.")
        self.executor = executor
        self.num_layers: int = executor.model.config.text_config.num_hidden_layers
        self.num_answered = 0
        self._samples = samples
        self._score = score
        self._hides_progress = None if progress else True
        self._setting = executor.knob_space.full
        self._references: list[tuple[str, list[str]]] = []  # metric and answers of each sample
        self._rows: dict[str, int] = {}
        # The images of a data set take long to decode, and are not looked at here.
        texts = samples.remove_columns("image") if isinstance(samples, Dataset) else samples
        for row, sample in enumerate(texts):
            if not sample["answers"]:
                raise ValueError(f"sample '{sample['sample_id']}' has no reference answers: leave it out.")
            if self._rows.setdefault(sample["sample_id"], row) != row:
                raise ValueError(
                    f"two samples have the id '{sample['sample_id']}': name each data set once, and give each row its own id."
                )
            self._references.append((sample["metric"], sample["answers"]))
        self._accuracies: dict[tuple[int, ...], np.ndarray] = {}  # NaN where a sample was not answered yet
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._fingerprint = executor.model_fingerprint
            for shard in sorted(self._path.glob("*.parquet")):
                self._read_shard(shard)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def all_blocks(self) -> tuple[int, ...]:
        """Every block of the executor."""
        return tuple(range(self.num_layers))

    @property
    def sample_ids(self) -> list[str]:
        """Ids of the samples, in order."""
        return list(self._rows)

    def num_missing(self, block_sets: Sequence[Sequence[int]]) -> int:
        """Answers that measuring these sets would take."""
        return sum(int(np.isnan(self._known(blocks)).sum()) for blocks in {tuple(blocks) for blocks in block_sets})

    def measure(self, block_sets: Sequence[Sequence[int]], title: str = "Measuring blocks") -> np.ndarray:
        """Accuracy of every sample with each set of blocks that run, ascending: `(sets, samples)`."""
        missing = self.num_missing(block_sets)
        if missing:
            with tqdm(total=missing, desc=title, unit="answer", disable=self._hides_progress) as bar:
                self._answer(dict.fromkeys(tuple(blocks) for blocks in block_sets), bar)
        return np.stack([self._known(blocks) for blocks in block_sets])

    def _known(self, blocks: Sequence[int]) -> np.ndarray:
        return self._accuracies.setdefault(tuple(blocks), np.full(len(self._samples), np.nan))

    def _answer(self, block_sets: Sequence[tuple[int, ...]], bar: tqdm) -> None:
        encoded = self.encoded
        # Prompts of similar length share a batch: little padding.
        order = np.argsort([len(sample.input_ids) for sample in encoded], kind="stable")
        unwritten: list[tuple[tuple[int, ...], int]] = []
        written_at = time.monotonic()
        try:
            for blocks in block_sets:
                known = self._known(blocks)
                missing = order[np.isnan(known[order])]
                for start in range(0, len(missing), self.executor.batch_size):
                    batch = missing[start : start + self.executor.batch_size].tolist()
                    prompts = [encoded[row] for row in batch]
                    answers = self.executor.generate(prompts, self._setting["top_k"], blocks)
                    for row, tokens in zip(batch, answers, strict=True):
                        metric, references = self._references[row]
                        known[row] = self._score(metric, self.executor.decode(tokens), references)
                        unwritten.append((blocks, row))
                    self.num_answered += len(batch)
                    bar.update(len(batch))
                    if time.monotonic() - written_at > SECONDS_BETWEEN_SHARDS:
                        self._write_shard(unwritten)
                        unwritten, written_at = [], time.monotonic()
        finally:
            self._write_shard(unwritten)

    @cached_property
    def encoded(self) -> list[EncodedSample]:
        """The samples as the executor takes them, encoded when first asked for."""
        encoded = []
        total, hidden = len(self._samples), self._hides_progress
        with tqdm(total=total, desc="Encoding images", unit="sample", disable=hidden) as bar:
            for start in range(0, total, self.executor.batch_size):
                stop = min(start + self.executor.batch_size, total)
                rows = [self._samples[index] for index in range(start, stop)]
                requests = [ExecutorRequest.of(row, self._setting) for row in rows]
                encoded += self.executor.encode(requests, self._setting["tier"])
                bar.update(len(rows))
        return encoded

    def _write_shard(self, measured: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Written whole or not at all, under a name of its own: the folder can be read after a kill, and shared."""
        if self._path is None or not measured:
            return
        sample_ids = self.sample_ids
        rows = [
            {
                "sample_id": sample_ids[row],
                "tier": self._setting["tier"],
                "top_k": self._setting["top_k"],
                "active_blocks": list(blocks),
                "accuracy": float(self._accuracies[blocks][row]),
                "executor_fingerprint": self._fingerprint,
            }
            for blocks, row in measured
        ]
        self._path.mkdir(parents=True, exist_ok=True)
        name = f"accuracies-{time.time_ns()}-{secrets.token_hex(4)}.parquet"
        temporary = self._path / f"{name}.tmp"
        with open(temporary, "wb") as file:
            schema = BLOCK_ACCURACY_FEATURES.arrow_schema
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file)
            file.flush()
            os.fsync(file.fileno())  # else the new name may outlive the bytes when the machine goes down
        os.replace(temporary, self._path / name)

    def _read_shard(self, shard: Path) -> None:
        try:
            table = pyarrow.parquet.read_table(shard, partitioning=None)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"'{shard}' is not a readable Parquet file ({error}): delete it, and its accuracies are measured again."
            ) from error
        if set(table.column_names) != set(BLOCK_ACCURACY_FEATURES):
            raise ValueError(
                f"'{shard}' has the columns {table.column_names} where accuracies have {list(BLOCK_ACCURACY_FEATURES)}: "
                "keep nothing but accuracies in this folder, or choose another folder."
            )
        for row in table.to_pylist():
            if row["executor_fingerprint"] != self._fingerprint:
                raise ValueError(
                    f"'{shard}' holds accuracies of another executor: fingerprint {row['executor_fingerprint'][:12]}, this "
                    f"one's is {self._fingerprint[:12]}. They differ in weights, tiers, `max_new_tokens`, processor or "
                    "precision: choose another folder, or delete this one to measure again."
                )
            is_asked_for = row["sample_id"] in self._rows
            if is_asked_for and (row["tier"], row["top_k"]) == (self._setting["tier"], self._setting["top_k"]):
                self._known(row["active_blocks"])[self._rows[row["sample_id"]]] = row["accuracy"]

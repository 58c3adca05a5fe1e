"""Outcomes: what the executor did with a sample at a knob setting. What was run once is kept and never run again."""

import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Value

from .executor import Executor, ExecutorOutput, ExecutorRequest, FeatureSource
from .knobs import KnobSetting, KnobSpace


logger = logging.getLogger(__name__)

SHIPPED_OUTCOMES = Path(__file__).parent / "assets" / "outcomes"
"""Where the outcomes are that ship with the package: a folder of shards each."""

_OTHER_COLUMNS = ("sample_id", "answer", "accuracy", "output_tokens", "latency_ms", "executor_fingerprint")


def outcome_features(knob_space: KnobSpace, count_names: Sequence[str]) -> Features:
    """
    Columns of a table of outcomes.

    Args:
        knob_space ([`KnobSpace`]):
            Has the knobs: a column each.
        count_names (`Sequence[str]`):
            Counts of the executor: a column each.

    Raises:
        ValueError: If a knob or a count has the name of another column.
    """
    columns = ["sample_id", *knob_space.names, "answer", "accuracy", *count_names]
    columns += ["output_tokens", "latency_ms", "executor_fingerprint"]
    repeated = [name for name in columns if columns.count(name) > 1]
    if repeated:
        raise ValueError(f"tables of outcomes would have two columns `{repeated[0]}`: rename the knob or count.")
    dtypes = {
        "sample_id": "string",
        **{knob.name: knob.dtype for knob in knob_space.knobs},
        "answer": "string",
        "accuracy": "float64",
        "latency_ms": "float64",
        "executor_fingerprint": "string",
    }
    return Features({name: Value(dtypes.get(name, "int32")) for name in columns})


@dataclass(frozen=True)
class Outcome:
    """
    What the executor did with one sample at one knob setting.

    Args:
        sample_id (`str`):
            Sample that was answered.
        setting ([`KnobSetting`]):
            Setting that it was answered at.
        answer (`str`):
            The executor's answer.
        accuracy (`float`):
            Score of the answer, from 0 to 1.
        counts (`Mapping[str, int]`):
            How large the inputs were, by the executor's `count_names`.
        output_tokens (`int`):
            Tokens generated, the end-of-sequence token included.
        latency_ms (`float`, *optional*):
            What the request took, in ms, where it was measured: recorded results have it, answers that are given in
            batches do not.
    """

    sample_id: str
    setting: KnobSetting
    answer: str
    accuracy: float
    counts: Mapping[str, int]
    output_tokens: int
    latency_ms: float | None = None


class OutcomeSource(Protocol):
    """
    Gives outcomes of samples at settings: from a record, or from a store that an executor fills.

    Attributes:
        knob_space ([`KnobSpace`]):
            Settings that outcomes can be asked for.
        features ([`FeatureSource`] or `None`):
            Gives the features of questions and images. `None` leaves a controller with the budget alone.
        num_executed (`int`):
            Answers that an executor was run for so far.
    """

    knob_space: KnobSpace
    features: FeatureSource | None
    num_executed: int

    def collect(
        self, samples: Sequence[Mapping[str, Any]], settings: Sequence[KnobSetting], progress: bool = False
    ) -> list[Outcome]:
        """
        Outcomes of pairs of a sample and a setting.

        Args:
            samples (`Sequence[dict]`):
                Rows with the columns `sample_id`, `image`, `question`, `answers`, `style` and `metric`.
            settings (`Sequence[KnobSetting]`):
                One setting for each sample.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar over the answers that are missing.

        Returns:
            `list[Outcome]`: One a pair, in order.

        Raises:
            ValueError: If the lengths differ, or there is no outcome of a pair.
        """

    def collect_together(self, samples: Sequence[Mapping[str, Any]], settings: Sequence[KnobSetting]) -> list[Outcome]:
        """
        As [`~OutcomeSource.collect`], called by all processes at once, each with pairs of its own: none is run by two of
        them.
        """

    def reload(self) -> None:
        """Sees what other processes have kept meanwhile."""

    def check_processes(self, num_processes: int) -> None:
        """
        Refuses to serve several processes where they cannot share outcomes.

        Raises:
            ValueError: If there are several, and they cannot.
        """

    def finish(self) -> None:
        """Tidies up what is kept, at the end of a run, in one process."""


def shipped_outcomes() -> list[str]:
    """Names of the outcomes that ship with the package, which stand for their folders: `"embedded"`, …"""
    return sorted(folder.name for folder in SHIPPED_OUTCOMES.iterdir() if folder.is_dir())


def _find_outcomes(name_or_path: str | Path) -> Path:
    """The folder of outcomes that ship, by their name, or of others, by their path."""
    if str(name_or_path) in shipped_outcomes():
        return SHIPPED_OUTCOMES / name_or_path
    if not Path(name_or_path).is_dir():
        raise FileNotFoundError(
            f"there is no folder of outcomes '{name_or_path}': give the path of one, or the name of one that ships "
            f"({', '.join(shipped_outcomes())})."
        )
    return Path(name_or_path)


class OutcomeStore:
    """
    Keeps outcomes in a folder of Parquet shards. A shard is written whole or not at all, so the folder can be read after
    a process was killed at any time, and several processes can add to one folder: each sees what was there when it
    opened the store or last called [`~OutcomeStore.reload`].

    Args:
        path (`str` or `Path`, *optional*):
            Folder of the shards, created if missing. `None` keeps the outcomes in memory only.
        executor_fingerprint (`str`):
            [`Executor.fingerprint`] of the executor that the outcomes come from.
        knob_space ([`KnobSpace`]):
            Its knobs. Outcomes at other values of these are kept, too.
        known (`Sequence[str | Path]`, *optional*):
            Other folders of shards, or names of outcomes that ship with the package
            ([`shipped_outcomes`]), that outcomes are looked up in, too. They are read once and never written to. Shards of
            another executor are left out, with a warning.

    Raises:
        FileNotFoundError: If a folder in `known` does not exist.
        ValueError: If a folder holds outcomes of another executor, or a shard that is not a table of outcomes.

    Example:

    ```python
    >>> store = OutcomeStore("outcomes", executor.fingerprint, executor.knob_space)
    >>> store.get("scenes/train/000012", executor.knob_space.cheapest)
    >>> store.add([outcome])
    ```
    """

    def __init__(
        self,
        path: str | Path | None,
        executor_fingerprint: str,
        knob_space: KnobSpace,
        known: Sequence[str | Path] = (),
    ):
        self.path = None if path is None else Path(path)
        self.executor_fingerprint = executor_fingerprint
        self.knob_space = knob_space
        self._outcomes: dict[tuple[str, KnobSetting], Outcome] = {}
        self._known: dict[tuple[str, KnobSetting], Outcome] = {}
        self._shards: set[str] = set()
        # A process id alone comes back after a restart, and on another machine that shares the folder.
        self._writer = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._num_written = 0
        for folder in known:
            for shard in sorted(_find_outcomes(folder).glob("*.parquet")):
                if self._is_of_executor(shard):
                    self._known.update(
                        ((outcome.sample_id, outcome.setting), outcome) for outcome in self._read_shard(shard)
                    )
                else:
                    logger.warning("The known outcomes in '%s' are of another executor: they are not used.", folder)
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            self.reload()

    def __len__(self) -> int:
        return len(self._outcomes.keys() | self._known.keys())

    def __contains__(self, key: tuple[str, KnobSetting]) -> bool:
        return key in self._outcomes or key in self._known

    def get(self, sample_id: str, setting: KnobSetting) -> Outcome | None:
        """The outcome of a sample at a setting, or `None` if it is not known."""
        key = sample_id, setting
        return self._outcomes.get(key) or self._known.get(key)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Keeps outcomes: they are on disk, as one new shard, when this returns. One that is known already stays."""
        new = {}
        for outcome in outcomes:
            key = (outcome.sample_id, outcome.setting)
            if key not in self:
                new.setdefault(key, outcome)
        if not new:
            return
        if self.path is not None:
            self._write_shard(list(new.values()))
        self._outcomes.update(new)

    def reload(self) -> None:
        """Reads the shards that other processes have written since the store was opened or last reloaded."""
        for shard in sorted(self.path.glob("*.parquet")):
            if shard.name not in self._shards:
                try:
                    rows = self._read_shard(shard)
                except FileNotFoundError:
                    # Another process has compacted the store meanwhile: the rows are in a shard that it wrote before.
                    return self.reload()
                for outcome in rows:
                    self._outcomes.setdefault((outcome.sample_id, outcome.setting), outcome)
                self._shards.add(shard.name)

    def compact(self) -> None:
        """
        Merges the shards that this store has read or written into one. Safe at any time: the merged shard is written
        before the others are deleted.
        """
        if self.path is None or len(self._shards) < 2:
            return
        merged = sorted(self._shards)
        self._write_shard(list(self._outcomes.values()))
        for name in merged:
            (self.path / name).unlink(missing_ok=True)
            self._shards.remove(name)

    def to_dataset(self) -> Dataset:
        """All outcomes of its own folder as a table with the columns of [`outcome_features`], ordered by sample and setting."""
        return Dataset(self._to_table([self._outcomes[key] for key in sorted(self._outcomes)]))

    def _to_table(self, outcomes: Sequence[Outcome]) -> pyarrow.Table:
        count_names = list(outcomes[0].counts) if outcomes else []
        rows = [
            {
                "sample_id": outcome.sample_id,
                **outcome.setting,
                "answer": outcome.answer,
                "accuracy": outcome.accuracy,
                **outcome.counts,
                "output_tokens": outcome.output_tokens,
                "latency_ms": outcome.latency_ms,
                "executor_fingerprint": self.executor_fingerprint,
            }
            for outcome in outcomes
        ]
        return pyarrow.Table.from_pylist(rows, schema=outcome_features(self.knob_space, count_names).arrow_schema)

    def _write_shard(self, outcomes: Sequence[Outcome]) -> None:
        name = f"outcomes-{self._writer}-{self._num_written:06d}.parquet"
        temporary = self.path / f"{name}.tmp"  # not read: `reload` takes names that end in .parquet
        with open(temporary, "wb") as file:
            pyarrow.parquet.write_table(self._to_table(outcomes), file)
            file.flush()
            os.fsync(file.fileno())  # else the new name may outlive the bytes when the machine goes down
        os.replace(temporary, self.path / name)
        self._num_written += 1
        self._shards.add(name)

    def _is_of_executor(self, shard: Path) -> bool:
        """Whether a shard is of this store's executor and of these knobs."""
        columns = pyarrow.parquet.read_schema(shard).names
        if not {*self.knob_space.names, "executor_fingerprint"} <= set(columns):
            return False
        fingerprints = pyarrow.parquet.read_table(shard, columns=["executor_fingerprint"], partitioning=None)
        return fingerprints["executor_fingerprint"].unique().to_pylist() == [self.executor_fingerprint]

    def _read_shard(self, shard: Path) -> list[Outcome]:
        try:
            table = pyarrow.parquet.read_table(shard, partitioning=None)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"'{shard}' is not a readable Parquet file ({error}): delete it, and its outcomes are computed again."
            ) from error
        knobs = self.knob_space.names
        missing = [column for column in (*knobs, *_OTHER_COLUMNS) if column not in table.column_names]
        if missing:
            raise ValueError(
                f"'{shard}' has no column {missing[0]!r} (it has {table.column_names}): keep nothing but outcomes over the "
                f"knobs {', '.join(knobs)} in this folder, or choose another folder."
            )
        count_names = [column for column in table.column_names if column not in (*knobs, *_OTHER_COLUMNS)]
        expected = outcome_features(self.knob_space, count_names).arrow_schema
        differing = [field for field in expected if table.schema.field(field.name).type != field.type]
        if differing:
            raise ValueError(
                f"'{shard}' has the column {differing[0].name!r} of type {table.schema.field(differing[0].name).type}, "
                f"outcomes have {differing[0].type}: keep nothing but outcomes in this folder, or choose another folder."
            )
        rows = table.to_pylist()
        fingerprints = {row["executor_fingerprint"] for row in rows}
        if fingerprints - {self.executor_fingerprint}:
            raise ValueError(
                f"'{shard}' holds outcomes of another executor: fingerprint {sorted(fingerprints)[0][:12]}, this one's is "
                f"{self.executor_fingerprint[:12]}. They differ in weights, blocks that run, what the knobs mean, "
                "`max_new_tokens`, processor or precision: choose another folder, or delete this one to compute its "
                "outcomes again."
            )
        # Settings and counts are few: one object each, for however many rows.
        settings: dict[tuple, KnobSetting] = {}
        counts: dict[tuple, dict[str, int]] = {}
        outcomes = []
        for row in rows:
            values, sizes = tuple(row[name] for name in knobs), tuple(row[name] for name in count_names)
            if values not in settings:
                settings[values] = KnobSetting(dict(zip(knobs, values, strict=True)))
            outcomes.append(
                Outcome(
                    sample_id=row["sample_id"],
                    setting=settings[values],
                    answer=row["answer"],
                    accuracy=row["accuracy"],
                    counts=counts.setdefault(sizes, dict(zip(count_names, sizes, strict=True))),
                    output_tokens=row["output_tokens"],
                    latency_ms=row["latency_ms"],
                )
            )
        return outcomes


class OutcomeCollector:
    """
    Gives the outcomes of samples at settings: those that the store has, and those that the executor is run for.

    Args:
        executor ([`Executor`]):
            Executor that answers, and that features come from.
        store ([`OutcomeStore`]):
            Where outcomes are looked up and kept.
        score (`Callable[[str, str, Sequence[str]], float]`):
            Accuracy of an answer, given the row's metric, the answer and the reference answers, e.g.
            [`~joint_controller.evaluation.scoring.score_answer`].

    Attributes:
        num_executed (`int`):
            Answers that the executor was run for so far.
    """

    def __init__(self, executor: Executor, store: OutcomeStore, score: Callable[[str, str, Sequence[str]], float]):
        if store.executor_fingerprint != executor.fingerprint:
            raise ValueError(
                f"the store keeps outcomes of executor {store.executor_fingerprint[:12]}, but this executor is "
                f"{executor.fingerprint[:12]}: open the store with `executor.fingerprint`."
            )
        self.executor = executor
        self.store = store
        self.score = score
        self.num_executed = 0

    @property
    def knob_space(self) -> KnobSpace:
        """Settings that outcomes can be asked for: those of the executor."""
        return self.executor.knob_space

    @property
    def features(self) -> FeatureSource:
        """What gives the features of questions and images: the executor."""
        return self.executor

    def collect(
        self, samples: Sequence[Mapping[str, Any]], settings: Sequence[KnobSetting], progress: bool = False
    ) -> list[Outcome]:
        """
        As [`OutcomeSource.collect`]. Runs the executor for the outcomes that are missing, each once even if it is asked
        for twice, and stores them batch by batch, so that little is lost when the process ends.

        Raises:
            ValueError: If the lengths differ, or a sample has no reference answers.
        """
        if len(samples) != len(settings):
            raise ValueError(f"{len(samples)} samples but {len(settings)} settings: give one setting for each sample.")
        requests: dict[tuple[str, KnobSetting], ExecutorRequest] = {}
        references: dict[str, tuple[str, list[str]]] = {}  # metric and answers of each sample
        for sample, setting in zip(samples, settings, strict=True):
            key = (sample["sample_id"], setting)
            if key in self.store or key in requests:
                continue
            if not sample["answers"]:
                raise ValueError(
                    f"sample '{sample['sample_id']}' has no reference answers, so it cannot be scored: leave it out."
                )
            references[sample["sample_id"]] = (sample["metric"], sample["answers"])
            requests[key] = ExecutorRequest.of(sample, setting)

        def score(output: ExecutorOutput) -> float:
            metric, answers = references[output.sample_id]
            return self.score(metric, output.answer, answers)

        def keep(outputs: list[ExecutorOutput]) -> None:
            self.num_executed += len(outputs)
            self.store.add(
                [
                    Outcome(
                        sample_id=output.sample_id,
                        setting=output.setting,
                        answer=output.answer,
                        accuracy=score(output),
                        counts=output.counts,
                        output_tokens=output.output_tokens,
                    )
                    for output in outputs
                ]
            )

        if requests:
            self.executor.run(list(requests.values()), on_batch=keep, progress=progress)
        return [
            self.store.get(sample["sample_id"], setting) for sample, setting in zip(samples, settings, strict=True)
        ]

    def collect_together(self, samples: Sequence[Mapping[str, Any]], settings: Sequence[KnobSetting]) -> list[Outcome]:
        """As [`OutcomeSource.collect_together`]. The store must be in a folder that all processes see."""
        state = PartialState()
        if state.num_processes > 1:
            keys = [(sample["sample_id"], setting) for sample, setting in zip(samples, settings, strict=True)]
            missing = gather_object([[key for key in keys if key not in self.store]])
            runs_on: dict[tuple[str, KnobSetting], int] = {}
            for process_index, missing_there in enumerate(missing):
                for key in missing_there:
                    runs_on.setdefault(key, process_index)
            mine = [row for row, key in enumerate(keys) if runs_on.get(key) == state.process_index]
            self.collect([samples[row] for row in mine], [settings[row] for row in mine])
            if runs_on:
                state.wait_for_everyone()
                self.store.reload()
        return self.collect(samples, settings)

    def reload(self) -> None:
        """As [`OutcomeSource.reload`]: a store in memory has no others to see."""
        if self.store.path is not None:
            self.store.reload()

    def check_processes(self, num_processes: int) -> None:
        if num_processes > 1 and self.store.path is None:
            raise ValueError(
                f"{num_processes} processes share their outcomes through a folder, but the outcome store is in memory: open "
                "it with a path."
            )

    def finish(self) -> None:
        """Merges the shards of the store."""
        self.store.compact()


def collect_shares(
    outcomes: OutcomeSource,
    samples: Sequence[Mapping[str, Any]],
    settings: Sequence[KnobSetting],
    progress: bool = False,
) -> list[Outcome]:
    """
    As [`OutcomeSource.collect`], called by all processes at once, all with the same pairs: each answers those of its share
    of the samples.

    Args:
        outcomes ([`OutcomeSource`]):
            Gives the outcomes.
        samples (`Sequence[dict]`), settings (`Sequence[KnobSetting]`), progress (`bool`, *optional*):
            As in [`OutcomeSource.collect`]; the main process shows the progress of its share.

    Returns:
        `list[Outcome]`: of all pairs, in order.
    """
    state = PartialState()
    if state.num_processes == 1:
        return outcomes.collect(samples, settings, progress=progress)
    numbers: dict[str, int] = {}
    owners = [numbers.setdefault(sample["sample_id"], len(numbers)) % state.num_processes for sample in samples]
    mine = [row for row, owner in enumerate(owners) if owner == state.process_index]
    outcomes.collect(
        [samples[row] for row in mine],
        [settings[row] for row in mine],
        progress=progress and state.is_main_process,
    )
    state.wait_for_everyone()
    outcomes.reload()
    return outcomes.collect(samples, settings)


class RecordedOutcomes:
    """
    Gives outcomes that were recorded before, without an executor to run: what a controller is trained on when nothing but
    results is at hand. An [`OutcomeSource`].

    Args:
        store ([`OutcomeStore`]):
            The recorded outcomes.
        knob_space ([`KnobSpace`]):
            Settings that were recorded.
        features ([`FeatureSource`], *optional*):
            Gives the features of questions and images, and never answers. `None` leaves a controller with the budget
            alone.
    """

    num_executed = 0

    def __init__(self, store: OutcomeStore, knob_space: KnobSpace, features: FeatureSource | None = None):
        self.store = store
        self.knob_space = knob_space
        self.features = features

    def collect(
        self, samples: Sequence[Mapping[str, Any]], settings: Sequence[KnobSetting], progress: bool = False
    ) -> list[Outcome]:
        """As [`OutcomeSource.collect`]."""
        if len(samples) != len(settings):
            raise ValueError(f"{len(samples)} samples but {len(settings)} settings: give one setting for each sample.")
        outcomes = []
        for sample, setting in zip(samples, settings, strict=True):
            outcome = self.store.get(sample["sample_id"], setting)
            if outcome is None:
                raise ValueError(
                    f"no outcome was recorded for sample '{sample['sample_id']}' at {setting}: record it, or leave out the "
                    "sample or the knob value."
                )
            outcomes.append(outcome)
        return outcomes

    def collect_together(self, samples: Sequence[Mapping[str, Any]], settings: Sequence[KnobSetting]) -> list[Outcome]:
        """As [`OutcomeSource.collect_together`]: each process has the whole record."""
        return self.collect(samples, settings)

    def reload(self) -> None:
        """Nothing to see: a record does not grow."""

    def check_processes(self, num_processes: int) -> None:
        """Nothing to refuse: each process has the whole record."""

    def finish(self) -> None:
        """Nothing to tidy up: a record is left as it is."""

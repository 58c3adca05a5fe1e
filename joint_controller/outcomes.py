"""Outcomes: what the executor did with a sample at a knob setting. What was run once is kept and never run again."""

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
import torch
from datasets import Dataset, Features, Value

from .executor import ExecutorOutput, ExecutorRequest
from .knobs import KnobSetting, KnobSpace
from .molmo.executor import MolmoExecutor


if TYPE_CHECKING:
    from .latency import LatencyEstimatorModel


OUTCOME_FEATURES = Features(
    {
        "sample_id": Value("string"),
        "tier": Value("string"),
        "top_k": Value("int32"),
        "num_blocks": Value("int32"),
        "answer": Value("string"),
        "accuracy": Value("float64"),
        "num_views": Value("int32"),
        "vision_tokens": Value("int32"),
        "text_tokens": Value("int32"),
        "output_tokens": Value("int32"),
        "latency_ms": Value("float64"),
        "executor_fingerprint": Value("string"),
    }
)
"""Columns of a table of outcomes."""


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
        num_views (`int`):
            Views that the image was encoded in: the global one and the crops.
        vision_tokens (`int`):
            Tokens that stood for the image.
        text_tokens (`int`):
            Tokens of the prompt beside the image's.
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
    num_views: int
    vision_tokens: int
    text_tokens: int
    output_tokens: int
    latency_ms: float | None = None


def predict_latency_ms(latency_estimator: "LatencyEstimatorModel | None", outcomes: Sequence[Outcome]) -> torch.Tensor:
    """
    Latency of requests whose outcome is known: estimated, or as it was measured.

    Args:
        latency_estimator ([`LatencyEstimatorModel`], *optional*):
            Estimator. `None` takes each outcome's own measured latency.
        outcomes (`Sequence[Outcome]`):
            Settings and token counts of n requests.

    Returns:
        `torch.Tensor`: ms, of shape (n,), on the CPU.

    Raises:
        ValueError: If there is no estimator, and an outcome whose latency was not measured.
    """
    if latency_estimator is None:
        for outcome in outcomes:
            if outcome.latency_ms is None:
                raise ValueError(
                    f"the latency of sample '{outcome.sample_id}' at {outcome.setting} was not measured: give a latency "
                    "estimator."
                )
        return torch.tensor([outcome.latency_ms for outcome in outcomes])
    counts = {
        name: torch.tensor([getattr(outcome, name) for outcome in outcomes])
        for name in ("num_views", "vision_tokens", "text_tokens", "output_tokens")
    }
    return latency_estimator.predict_latency_ms([outcome.setting for outcome in outcomes], **counts).cpu()


class OutcomeStore:
    """
    Keeps outcomes in a folder of Parquet shards. A shard is written whole or not at all, so the folder can be read after
    a process was killed at any time, and several processes can add to one folder: each sees what was there when it
    opened the store or last called [`~OutcomeStore.reload`].

    Args:
        path (`str` or `Path`, *optional*):
            Folder of the shards, created if missing. `None` keeps the outcomes in memory only.
        executor_fingerprint (`str`):
            [`MolmoExecutor.fingerprint`] of the executor that the outcomes come from.

    Raises:
        ValueError: If the folder holds outcomes of another executor, or a shard that is not a table of outcomes.

    Example:

    ```python
    >>> store = OutcomeStore("outcomes", executor.fingerprint)
    >>> store.get("scenes/train/000012", KnobSetting("low", 4, 12))
    >>> store.add([outcome])
    ```
    """

    def __init__(self, path: str | Path | None, executor_fingerprint: str):
        self.path = None if path is None else Path(path)
        self.executor_fingerprint = executor_fingerprint
        self._outcomes: dict[tuple[str, KnobSetting], Outcome] = {}
        self._shards: set[str] = set()
        # A process id alone comes back after a restart, and on another machine that shares the folder.
        self._writer = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._num_written = 0
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            self.reload()

    def __len__(self) -> int:
        return len(self._outcomes)

    def __contains__(self, key: tuple[str, KnobSetting]) -> bool:
        return key in self._outcomes

    def get(self, sample_id: str, setting: KnobSetting) -> Outcome | None:
        """The outcome of a sample at a setting, or `None` if it is not known."""
        return self._outcomes.get((sample_id, setting))

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Keeps outcomes: they are on disk, as one new shard, when this returns. One that is known already stays."""
        new = {}
        for outcome in outcomes:
            key = (outcome.sample_id, outcome.setting)
            if key not in self._outcomes:
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
        """All outcomes as a table with the columns of [`OUTCOME_FEATURES`], ordered by sample and setting."""
        return Dataset(self._to_table([self._outcomes[key] for key in sorted(self._outcomes)]))

    def _to_table(self, outcomes: Sequence[Outcome]) -> pyarrow.Table:
        rows = [
            {
                "sample_id": outcome.sample_id,
                **outcome.setting.to_dict(),
                "answer": outcome.answer,
                "accuracy": outcome.accuracy,
                "num_views": outcome.num_views,
                "vision_tokens": outcome.vision_tokens,
                "text_tokens": outcome.text_tokens,
                "output_tokens": outcome.output_tokens,
                "latency_ms": outcome.latency_ms,
                "executor_fingerprint": self.executor_fingerprint,
            }
            for outcome in outcomes
        ]
        return pyarrow.Table.from_pylist(rows, schema=OUTCOME_FEATURES.arrow_schema)

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

    def _read_shard(self, shard: Path) -> list[Outcome]:
        try:
            table = pyarrow.parquet.read_table(shard, partitioning=None)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"'{shard}' is not a readable Parquet file ({error}): delete it, and its outcomes are computed again."
            ) from error
        # Shards of the first version have no measured latencies.
        if set(table.column_names) | {"latency_ms"} != set(OUTCOME_FEATURES):
            raise ValueError(
                f"'{shard}' has the columns {table.column_names} where outcomes have {list(OUTCOME_FEATURES)}: keep "
                "nothing but outcomes in this folder, or choose another folder."
            )
        rows = table.to_pylist()
        fingerprints = {row.pop("executor_fingerprint") for row in rows}
        if fingerprints - {self.executor_fingerprint}:
            raise ValueError(
                f"'{shard}' holds outcomes of another executor: fingerprint {sorted(fingerprints)[0][:12]}, this one's is "
                f"{self.executor_fingerprint[:12]}. They differ in weights, importance scores, tiers, `max_new_tokens`, "
                "processor or precision: choose another folder, or delete this one to compute its outcomes again."
            )
        return [
            Outcome(setting=KnobSetting(row.pop("tier"), row.pop("top_k"), row.pop("num_blocks")), **row)
            for row in rows
        ]


class OutcomeCollector:
    """
    Gives the outcomes of samples at settings: those that the store has, and those that the executor is run for.

    Args:
        executor ([`MolmoExecutor`]):
            Executor that answers.
        store ([`OutcomeStore`]):
            Where outcomes are looked up and kept.
        score (`Callable[[str, str, Sequence[str]], float]`):
            Accuracy of an answer, given the row's metric, the answer and the reference answers, e.g.
            [`~joint_controller.evaluation.scoring.score_answer`].

    Attributes:
        num_executed (`int`):
            Answers that the executor was run for so far.
    """

    def __init__(
        self, executor: MolmoExecutor, store: OutcomeStore, score: Callable[[str, str, Sequence[str]], float]
    ):
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
    def feature_source(self) -> MolmoExecutor:
        """What gives the features of questions and images: the executor."""
        return self.executor

    def collect(
        self, samples: Sequence[Mapping[str, Any]], settings: Sequence[KnobSetting], progress: bool = False
    ) -> list[Outcome]:
        """
        Outcomes of pairs of a sample and a setting. Runs the executor for those that are missing, each once even if it is
        asked for twice, and stores them batch by batch, so that little is lost when the process ends.

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
                        num_views=output.num_views,
                        vision_tokens=output.vision_tokens,
                        text_tokens=output.text_tokens,
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


class RecordedOutcomes:
    """
    Gives outcomes that were recorded before, without an executor to run: what a controller is trained on when nothing but
    results is at hand. Stands where an [`OutcomeCollector`] does.

    Args:
        store ([`OutcomeStore`]):
            The recorded outcomes.
        knob_space ([`KnobSpace`]):
            Settings that were recorded.
        feature_source ([`MolmoExecutor`], *optional*):
            Gives the features of questions and images, and never answers. `None` leaves a controller with the budget
            alone.

    Attributes:
        num_executed (`int`):
            0: nothing is ever run.
    """

    num_executed = 0

    def __init__(self, store: OutcomeStore, knob_space: KnobSpace, feature_source: MolmoExecutor | None = None):
        self.store = store
        self.knob_space = knob_space
        self.feature_source = feature_source

    def collect(
        self, samples: Sequence[Mapping[str, Any]], settings: Sequence[KnobSetting], progress: bool = False
    ) -> list[Outcome]:
        """
        Outcomes of pairs of a sample and a setting.

        Args:
            samples (`Sequence[dict]`):
                Rows with the column `sample_id`.
            settings (`Sequence[KnobSetting]`):
                One setting for each sample.
            progress (`bool`, *optional*, defaults to `False`):
                Has no effect: looking up takes no time.

        Returns:
            `list[Outcome]`: One a pair, in order.

        Raises:
            ValueError: If the lengths differ, or an outcome was not recorded.
        """
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

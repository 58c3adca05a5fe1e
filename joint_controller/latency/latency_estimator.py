"""Where latencies come from: the interface of an estimator, and latencies that were recorded with their outcomes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from ..executor import Executor
from ..knobs import KnobSetting


if TYPE_CHECKING:
    from ..outcomes import Outcome


@runtime_checkable
class LatencyEstimator(Protocol):
    """Gives what requests take, in ms at batch 1."""

    def latency_ms(self, outcomes: "Sequence[Outcome]") -> torch.Tensor:
        """
        Latency of requests whose outcome is known.

        Args:
            outcomes (`Sequence[Outcome]`):
                Settings, counts and output tokens of n requests.

        Returns:
            `torch.Tensor`: ms, of shape (n,), float32, on the CPU.
        """

    def predict_latency_ms(
        self,
        settings: Sequence[KnobSetting],
        counts: Mapping[str, torch.Tensor | Sequence[int]],
        output_tokens: torch.Tensor | Sequence[int],
        quantile: float | None = None,
    ) -> torch.Tensor:
        """
        Latency of requests from the sizes of their inputs.

        Args:
            settings (`Sequence[KnobSetting]`):
                s settings.
            counts (`Mapping[str, torch.Tensor | Sequence[int]]`):
                Every count of the executor by name, of shape (s,) for s requests, or (n, s) for n requests at each of the
                settings.
            output_tokens (`torch.Tensor` or `Sequence[int]`):
                Tokens of the answers with the end of sequence, 1 or more; a shape that broadcasts with that of counts.
            quantile (`float`, *optional*):
                Share of requests whose latency is to lie below what is predicted, e.g. 0.95 for a promise that is kept 19
                times in 20. By default, the typical latency.

        Returns:
            `torch.Tensor`: ms, of the shape of counts, float32.

        Raises:
            ValueError: If nothing can be predicted for these, or not this quantile.
        """

    def check_executor(self, executor: Executor) -> None:
        """
        Makes sure that latencies are those of an executor.

        Raises:
            ValueError: If they are of another one.
        """

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what can be written of it to a folder."""


class RecordedLatencies:
    """
    A [`LatencyEstimator`] that knows the latencies that were measured with outcomes, and can predict no others.
    """

    def latency_ms(self, outcomes: "Sequence[Outcome]") -> torch.Tensor:
        for outcome in outcomes:
            if outcome.latency_ms is None:
                raise ValueError(
                    f"the latency of sample '{outcome.sample_id}' at {outcome.setting} was not measured: give a latency "
                    "estimator."
                )
        return torch.tensor([outcome.latency_ms for outcome in outcomes])

    def predict_latency_ms(
        self,
        settings: Sequence[KnobSetting],
        counts: Mapping[str, torch.Tensor | Sequence[int]],
        output_tokens: torch.Tensor | Sequence[int],
        quantile: float | None = None,
    ) -> torch.Tensor:
        raise ValueError("recorded latencies say nothing about other requests: give a latency estimator.")

    def check_executor(self, executor: Executor) -> None:
        """Nothing to check: what was recorded was recorded."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Nothing to write: latencies are with the outcomes."""

"""Where latencies come from: the interface of an estimator, and latencies that were recorded with their outcomes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from ..executor import MODEL_SCOPE, REQUEST_SCOPE, Executor
from ..knobs import KnobSetting
from .request_costs import check_latency_scope
from .way_of_running import WayOfRunning


if TYPE_CHECKING:
    from ..outcomes import Outcome


SCOPE_IN_WORDS = {REQUEST_SCOPE: "whole requests", MODEL_SCOPE: "the model alone"}
"""What latencies are of, by latency scope, as logs and cards say it."""


@runtime_checkable
class LatencyEstimator(Protocol):
    """
    Gives what requests take, in ms at batch 1.

    Attributes:
        latency_scope (`str`):
            What its latencies are of: `"request"`, all that a request costs by the clock, or `"model"`, the stages of the
            model alone.
        way ([`~latency.way_of_running.WayOfRunning`] or `None`):
            How the executor was run that they are of; `None` where that is unknown.
    """

    latency_scope: str
    way: WayOfRunning | None

    def in_scope(self, latency_scope: str) -> "LatencyEstimator":
        """
        The estimator of these latencies in a scope.

        Args:
            latency_scope (`str`):
                `"request"` or `"model"`.

        Raises:
            ValueError: If it knows the model's stages alone, and whole requests are asked for.
        """

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
                Counts of the executor by name, of shape (s,) for s requests, or (n, s) for n requests at each of the
                settings: every one that the latency depends on.
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
        Makes sure that latencies are those of an executor of this family and of these sizes, however it is run.

        Raises:
            ValueError: If they are of another one.
        """

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what can be written of it to a folder."""


class ModelLatencies:
    """What is common to latencies whose way of running is unknown, and that are of the model's stages alone."""

    latency_scope = MODEL_SCOPE
    way = None

    def in_scope(self, latency_scope: str) -> "LatencyEstimator":
        """As [`LatencyEstimator.in_scope`]."""
        check_scope_is_known(self.latency_scope, latency_scope)
        return self


def check_scope_is_known(known: str, latency_scope: str) -> None:
    """Refuses (`ValueError`) to take latencies of the model alone for those of whole requests."""
    check_latency_scope(latency_scope)
    if (known, latency_scope) == (MODEL_SCOPE, REQUEST_SCOPE):
        raise ValueError(
            "these latencies are of the model alone, not of whole requests: measure those with `joint-controller profile`, or "
            f"pass `--latency_scope {MODEL_SCOPE}`."
        )


class RecordedLatencies(ModelLatencies):
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

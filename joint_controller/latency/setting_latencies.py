"""What one request takes at each setting, from what other requests had in common with it."""

import itertools
import operator
from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import torch

from ..executor import DECODE
from ..knobs import KnobSetting
from .modeling_latency_estimator import LatencyEstimatorModel, learned_factor, weighted_sum


MOST_KNOWN = 4096
"""Rows of counts whose latencies are kept, of each group of stages: half a kilobyte each."""


class SettingLatencies:
    """
    Predicts for one request, at all settings of a knob space, what [`LatencyEstimatorModel.predict_latency_ms`] does (but for
    rounding). It is faster as hardly anything of a request is new: a latency is a sum over stages, none of which looks at all
    counts. The number of an image's pixels may have any value, but is a plain summand; into how many views the image is cut,
    and how many tokens the prompt has, come again and again.

    Args:
        latency_estimator ([`LatencyEstimatorModel`]):
            The estimator, which is not to be changed afterwards.
        settings (`Sequence[KnobSetting]`):
            s settings.
        count_names (`Sequence[str]`):
            Counts of a request, in the order in which they will be given.
        answers (`tuple[int, int]`):
            Output tokens of two answers.
    """

    def __init__(
        self,
        latency_estimator: LatencyEstimatorModel,
        settings: Sequence[KnobSetting],
        count_names: Sequence[str],
        answers: tuple[int, int],
    ):
        costs = latency_estimator.costs
        # Settings with the same values of all knobs that cost something by themselves differ in their counts alone.
        knobs = [tuple(setting[name] for name in costs.knob_names) for setting in settings]
        distinct = list(dict.fromkeys(knobs))
        self._knobs_of_setting = [distinct.index(values) for values in knobs]
        columns = dict(zip(costs.knob_names, torch.tensor(distinct, dtype=torch.float32).unbind(1), strict=True))
        columns["output_tokens"] = torch.tensor(answers, dtype=torch.float32)[:, None]
        by_counts: dict[tuple[str, ...], list[_Stage]] = {}
        for name in costs.stages:
            stage = _Stage(latency_estimator, name)
            seen = costs.looked_at(name) - set(stage.summands)
            by_counts.setdefault(tuple(name for name in count_names if name in seen), []).append(stage)
        self._groups = [
            _StageGroup(stages, names, count_names, columns, (2, len(distinct))) for names, stages in by_counts.items()
        ]

    def predict(self, counts: Sequence[tuple[int, ...]]) -> tuple[Sequence[float], Sequence[float]]:
        """
        Latencies of a request.

        Args:
            counts (`Sequence[tuple[int, ...]]`):
                Its counts at each of the s settings.

        Returns:
            `tuple[Sequence[float], Sequence[float]]`: with each of the two answers, ms at each setting.
        """
        rows = list(dict.fromkeys(counts))  # few settings have counts of their own
        of_groups = zip(*[group.latencies_ms(rows) for group in self._groups], strict=True)
        # At each combination of knobs, with both answers:
        pairs_ms = {row: reduce(operator.add, parts).T.tolist() for row, parts in zip(rows, of_groups, strict=True)}
        pairs = [pairs_ms[row][knobs] for row, knobs in zip(counts, self._knobs_of_setting, strict=True)]
        first, second = zip(*pairs, strict=True)
        return first, second


class _StageGroup:
    """Stages that look at the same counts, but for plain summands, and what they take together."""

    def __init__(
        self,
        stages: Sequence["_Stage"],
        names: Sequence[str],
        count_names: Sequence[str],
        columns: Mapping[str, torch.Tensor],
        shape: tuple[int, int],
    ):
        self.stages = stages
        self.names, self.places = names, [count_names.index(name) for name in names]
        self.summands = [(name, count_names.index(name)) for stage in stages for name in stage.summands]
        self.columns = columns  # of knobs and answers
        self.shape = shape  # answers, combinations of knobs
        # By counts: what the stages take without the summands, and how much one more of each of these adds.
        self._known: dict[tuple[int, ...], tuple[np.ndarray, ...]] = {}

    def latencies_ms(self, rows: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """ms for each row of all counts, with each answer, at each combination of knobs."""
        keys = [tuple([row[place] for place in self.places]) for row in rows]
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if new:
            self._known.update(zip(new, self._predict(new), strict=True))
        found = []
        for row, key in zip(rows, keys, strict=True):
            latencies_ms, *slopes = self._known[key]
            for slope, (_, place) in zip(slopes, self.summands, strict=True):
                latencies_ms = latencies_ms + slope * row[place]
            found.append(latencies_ms)
        return found

    @torch.inference_mode()
    def _predict(self, keys: Sequence[tuple[int, ...]]) -> list[tuple[np.ndarray, ...]]:
        """For each row of the counts that are looked at: ms without the summands, and what one more of each adds."""
        counts = torch.tensor(keys, dtype=torch.float32)[:, None, :, None].unbind(2)  # (rows, answers, combinations)
        columns = {**self.columns, **dict(zip(self.names, counts, strict=True))}
        columns |= {name: torch.zeros(()) for name, _ in self.summands}
        latencies_ms, slopes = zip(*[stage.predict(columns) for stage in self.stages], strict=True)
        parts = [reduce(operator.add, latencies_ms), *itertools.chain(*slopes)]
        # In float64, where summing up does not round.
        return list(zip(*[part.double().expand(len(keys), *self.shape).numpy() for part in parts], strict=True))


class _Stage:
    """A stage of an estimator, on the CPU. `summands` are counts that are a feature each, and nothing else."""

    def __init__(self, latency_estimator: LatencyEstimatorModel, name: str):
        coefficients, units = latency_estimator.stage_parameters(name)
        self.costs, self.name = latency_estimator.costs, name
        self.coefficients, self.units = coefficients.tolist(), units.cpu()
        self.summands = {name: self.coefficients[place] for name, place in self.costs.summands(name).items()}

    def predict(self, columns: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """ms (of decoding, all steps together), and how much one more of each summand adds."""
        terms = self.costs.terms(self.name, columns)
        factor = learned_factor(self.units, terms.inputs)
        if self.name == DECODE:
            factor = factor * (columns["output_tokens"] - 1)
        return weighted_sum(self.coefficients, terms.features) * factor, [
            coefficient * factor for coefficient in self.summands.values()
        ]

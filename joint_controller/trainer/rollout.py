"""What rolling the controller out needs beside the policy: samples, features, sampling noise and outcomes."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..knobs import KnobSetting
from ..outcomes import Outcome, OutcomeCollector, RecordedOutcomes


class FeatureCache:
    """
    Feature vectors of the frozen executor, the least recently used dropped when they fill their memory.

    A vector must not depend on what it is computed together with: a resumed run, which starts with an empty cache, must
    see the same bits as one that was never interrupted. The executor sees to that.

    Args:
        max_bytes (`int`, *optional*, defaults to 256 MiB):
            Memory that the vectors may take.
    """

    def __init__(self, max_bytes: int = 2**28):
        self.max_bytes = max_bytes
        self._features: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def lookup(self, keys: Sequence[Hashable], compute: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
        """
        Stacks the vectors of some keys.

        Args:
            keys (`Sequence[Hashable]`):
                One for each row. Keys may repeat.
            compute (`Callable[[list[int]], torch.Tensor]`):
                Gives the vectors of rows, called with the position of one row for each key that is not kept.

        Returns:
            `torch.Tensor`: Features of shape (rows, size), on the CPU.
        """
        missing: dict[Hashable, int] = {}
        for row, key in enumerate(keys):
            if key in self._features:
                self._features.move_to_end(key)
            else:
                missing.setdefault(key, row)
        if missing:
            self._features.update(zip(missing, compute(list(missing.values())).cpu(), strict=True))
        features = torch.stack([self._features[key] for key in keys])
        while len(self._features) * features[0].nbytes > self.max_bytes:
            self._features.popitem(last=False)
        return features


def draw_action_noise(seed: int, epoch: int, sample_id: str, num_generations: int, num_logits: int) -> torch.Tensor:
    """
    Gumbel noise for the decisions of a group: the argmax of logits plus this noise is a sample from their softmax. Like
    the group's budget it depends on nothing but its arguments, so that a resumed run, or one on another number of
    processes, takes the same decisions.

    Args:
        seed (`int`):
            Seed of the run.
        epoch (`int`):
            Epoch, counted from 0.
        sample_id (`str`):
            Id of the group's sample.
        num_generations (`int`):
            Members of the group.
        num_logits (`int`):
            Values of all knobs together.

    Returns:
        `torch.Tensor`: Noise of shape (num_generations, num_logits).
    """
    digest = hashlib.sha256(f"actions/{seed}/{epoch}/{sample_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return -torch.empty(num_generations, num_logits).exponential_(generator=generator).log()


def collect_outcomes(
    collector: OutcomeCollector | RecordedOutcomes,
    samples: Sequence[Mapping[str, Any]],
    settings: Sequence[KnobSetting],
) -> list[Outcome]:
    """
    Outcomes of pairs of a sample and a setting, where every process asks for its own pairs and none is run by two of
    them. To be called by all processes at once.

    Args:
        collector ([`OutcomeCollector`] or [`RecordedOutcomes`]):
            This process's collector. With several processes, its store must be in a folder that all of them see.
        samples (`Sequence[dict]`):
            Rows as [`OutcomeCollector.collect`] takes them.
        settings (`Sequence[KnobSetting]`):
            One setting for each sample.

    Returns:
        `list[Outcome]`: One a pair, in order.
    """
    state = PartialState()
    if state.num_processes > 1 and isinstance(collector, OutcomeCollector):
        keys = [(sample["sample_id"], setting) for sample, setting in zip(samples, settings, strict=True)]
        missing = gather_object([[key for key in keys if key not in collector.store]])
        runs_on: dict[tuple[str, KnobSetting], int] = {}
        for process_index, missing_there in enumerate(missing):
            for key in missing_there:
                runs_on.setdefault(key, process_index)
        mine = [row for row, key in enumerate(keys) if runs_on.get(key) == state.process_index]
        collector.collect([samples[row] for row in mine], [settings[row] for row in mine])
        if runs_on:
            state.wait_for_everyone()
            collector.store.reload()
    return collector.collect(samples, settings)

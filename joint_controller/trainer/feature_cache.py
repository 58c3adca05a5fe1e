"""Features of the frozen executor, kept between rollouts."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch

from ..executor import ExecutorRequest, FeatureSource
from ..knobs import KnobSpace


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


class CachedFeatures:
    """
    A [`FeatureSource`] that computes no vector twice as long as it is kept.

    Args:
        features ([`FeatureSource`]):
            Computes them.
        knob_space ([`KnobSpace`]):
            Tells the knobs of stage 1, which decide how images are encoded.
    """

    def __init__(self, features: FeatureSource, knob_space: KnobSpace):
        self.question_size, self.vision_size = features.question_size, features.vision_size
        self._source = features
        self._stage1_names = [knob_space.names[position] for position in knob_space.decided_by(1)]
        self._questions, self._images = FeatureCache(), FeatureCache()

    def question_features(self, questions: Sequence[str]) -> torch.Tensor:
        return self._questions.lookup(
            questions, lambda rows: torch.cat([self._source.question_features([questions[row]]) for row in rows])
        )

    def vision_features(self, requests: Sequence[ExecutorRequest]) -> torch.Tensor:
        # An image has the same features whatever is asked about it.
        keys = [
            (one.image_id or one.sample_id, *(one.setting[name] for name in self._stage1_names)) for one in requests
        ]
        return self._images.lookup(keys, lambda rows: self._source.vision_features([requests[row] for row in rows]))

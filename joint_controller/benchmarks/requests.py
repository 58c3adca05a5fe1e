"""Requests that benchmarks ask an executor: images of a number of crops, questions of a number of tokens."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from ..executor import ExecutorRequest
from ..knobs import KnobSetting
from ..molmo.executor import MolmoExecutor
from ..molmo.executor.encoding import PreparedSample
from ..molmo.knob_space import tier_crops_of


LONGER_SIDE = 640
"""Longer side of the images, in pixels, as photographs of VQA data sets have it."""


@contextmanager
def remember_images(*executors: MolmoExecutor) -> Iterator[None]:
    """Lets executors cut each image once: what that takes is in no number of a benchmark of batches."""
    prepared: dict[tuple, tuple[Any, Any]] = {}
    usual = [executor.encoder.prepare for executor in executors]

    def remembering(prepare: Callable[..., PreparedSample]) -> Callable[..., PreparedSample]:
        def prepare_once(sample: ExecutorRequest, image: Image.Image, tier: str) -> PreparedSample:
            key = (id(image), sample.question, sample.style, tier)
            if key not in prepared:
                # The image is kept, too: as long as it lives, no other one has its id.
                prepared[key] = image, prepare(sample, image, tier)
            return prepared[key][1]

        return prepare_once

    for executor in executors:
        executor.encoder.prepare = remembering(executor.encoder.prepare)
    try:
        yield
    finally:
        for executor, prepare in zip(executors, usual, strict=True):
            executor.encoder.prepare = prepare


class RequestMaker:
    """
    Makes requests: images of noise, questions of random words. The executor says how images are cut, what words there are,
    and what settings.
    """

    def __init__(self, executor: MolmoExecutor, seed: int):
        self.executor = executor
        self.processor = executor.processor
        self.knob_space = executor.knob_space
        self.tier_crops = tier_crops_of(executor.knob_space)
        self.max_crops = executor.model.config.max_crops
        self.seed = seed
        # Words that are one token where they follow a blank, whatever marks that in the vocabulary (GPT-2's is "Ġ").
        tokens = self.processor.tokenizer.get_vocab()
        words = sorted({token.removeprefix("Ġ") for token in tokens})
        words = [word for word in words if word.isalnum() and word.isascii()]
        ids = self.processor.tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
        self._words = [word for word, its_ids in zip(words, ids, strict=True) if len(its_ids) == 1]

    def make(
        self, sample_id: str, setting: KnobSetting, num_crops: int, num_tokens: int, seed: int
    ) -> ExecutorRequest:
        """
        A request whose image has `num_crops` crops (`ValueError` if none has at the setting's tier), and whose
        question fills the prompt up to `num_tokens` tokens (0: a question of five words). The benchmark's seed and
        this one decide on both.
        """
        size = self._size_with(num_crops, setting["tier"])
        if size is None:
            raise ValueError(f"no image has {num_crops} crops at tier '{setting['tier']}'.")
        pixels = np.random.default_rng([self.seed, seed]).integers(0, 256, (*size, 3), dtype=np.uint8)
        # A question of one word, and then as many more as are missing.
        tokens = self.processor.count_vision_tokens(*size, tier=setting["tier"], tier_crops=self.tier_crops)
        prompt_ids = self.processor.prompt_ids("a", "vqa2")
        count = 1 + max(num_tokens - 1 - tokens - len(prompt_ids), 4 if num_tokens == 0 else 0)
        question = " ".join(random.Random(f"{self.seed}/{seed}").choices(self._words, k=count))
        return ExecutorRequest(sample_id, Image.fromarray(pixels), question, "vqa2", setting)

    def crops_of(self, tier: str) -> list[int]:
        """Numbers of crops, ascending, that images have at a tier."""
        fewest, most = self.tier_crops[tier]
        numbers = range(fewest, min(most, self.max_crops) + 1)
        return [number for number in numbers if self._size_with(number, tier) is not None]

    def _size_with(self, num_crops: int, tier: str) -> tuple[int, int] | None:
        """Height and width of an image that is cut into that many crops."""
        for rows in range(1, num_crops + 1):
            columns = num_crops // rows
            size = tuple(LONGER_SIDE * side // max(rows, columns) for side in (rows, columns))
            if rows * columns == num_crops and max(size) <= 4 * min(size):
                tiling = self.processor.image_processor.choose_tiling(*size, tier=tier, tier_crops=self.tier_crops)
                if tiling[0] * tiling[1] == num_crops:
                    return size
        return None

    def mixed(self, count: int, num_samples: int, name: str) -> list[ExecutorRequest]:
        """
        Requests of random settings about samples with random images, of as many crops as their tiers allow. Where the
        executor remembers images, theirs have been cut. Samples of another name are others.
        """
        draw = random.Random(f"{self.seed}/{name}")
        settings = list(self.knob_space)
        crops = {tier: self.crops_of(tier) for tier in self.tier_crops}
        made: dict[tuple, ExecutorRequest] = {}
        requests = []
        for _ in range(count):
            setting, sample = draw.choice(settings), draw.randrange(num_samples)
            key = (sample, setting["tier"])
            if key not in made:
                number = draw.choice(crops[setting["tier"]])
                made[key] = self.make(f"{name}/{sample}", setting, number, 0, seed=1000 + sample)
            requests.append(replace(made[key], setting=setting))
        for (_, tier), one in made.items():
            self.executor.encoder.prepare(one, one.image, tier)
        return requests

"""The first stages of a request: its image, cut and encoded once for all settings of a tier, and its prompt."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
import xxhash
from PIL import ExifTags, Image

from ...executor.requests import ExecutorRequest
from .inference import Inference
from .memory import do_or_split


@dataclass(frozen=True)
class ImageLayout:
    """What all images of a tiling have in common in a prompt, on the model's device."""

    tiling: tuple[int, int]
    ids: torch.LongTensor  # the beginning-of-sequence token and the tokens that stand for the image
    places: torch.LongTensor  # (N,): which of an image's features, views end to end, enter the sequence
    positions: torch.LongTensor  # (N,): where in the prompt each of them goes


@dataclass(frozen=True)
class PreparedSample:
    """A prompt whose image has been cut, but not encoded."""

    pixel_values: torch.Tensor  # (1, V, P, 3 * patch²)
    image_masks: torch.Tensor  # (1, V, P)
    layout: ImageLayout
    prompt_ids: list[int]
    counts: dict[str, int]  # by `COUNT_NAMES`


@dataclass(frozen=True)
class EncodedSample:
    """A prompt whose image has been encoded."""

    input_ids: torch.LongTensor  # (L,), without padding
    image_features: (
        torch.Tensor
    )  # (N, hidden): those that enter the sequence, none of those that overlap and are dropped
    image_input_idx: torch.LongTensor  # (N,): position of each feature in the prompt
    counts: dict[str, int]  # by `COUNT_NAMES`

    @property
    def num_bytes(self) -> int:
        tensors = (self.input_ids, self.image_features, self.image_input_idx)
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def vision_features(self) -> torch.Tensor:
        """What a controller sees of the image: the mean of its features, `(hidden,)`, float32."""
        return self.image_features.float().mean(dim=0)


class SampleEncoder:
    """
    Encodes samples, and keeps what it encoded as long as there is room: the same image is asked for at many settings.

    `inference` runs tower and connector, `num_workers` images at a time where they do not share passes. `prepare`
    cuts a sample's image at a tier. Of what is kept, `num_bytes`, the least recently used goes first where it is more than
    `cache_bytes`.
    """

    def __init__(
        self,
        inference: Inference,
        prepare: Callable[[ExecutorRequest, Image.Image, str], PreparedSample],
        device: torch.device,
        num_workers: int,
        cache_bytes: int,
    ):
        self.inference = inference
        self.prepare = prepare
        self.device = device
        self.num_workers = num_workers
        self.cache_bytes = cache_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[tuple[str, str], EncodedSample] = OrderedDict()
        # Questions about one image share its features, as long as one of them is kept.
        self._features_of_image: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()

    def encode(self, samples: Sequence[ExecutorRequest], tier: str) -> list[EncodedSample]:
        """The samples at a tier, in order, each encoded once as long as it is kept."""
        # Held here as well: a call's images may be more than the cache keeps.
        found: dict[str, EncodedSample] = {}
        missing: dict[str, ExecutorRequest] = {}
        for sample in samples:
            key = (sample.sample_id, tier)
            if key in self._kept:
                self._kept.move_to_end(key)
                found[sample.sample_id] = self._kept[key]
            else:
                missing.setdefault(sample.sample_id, sample)
        features_of = self._features_together if self.inference.shares_passes else self._features_each
        for sample, prepared, digest, features in features_of(list(missing.values()), tier):
            self._features_of_image[digest] = features
            found[sample.sample_id] = self._encoded_sample(prepared, features)
            self._keep((sample.sample_id, tier), found[sample.sample_id])
        return [found[sample.sample_id] for sample in samples]

    def encode_prepared(self, prepared: PreparedSample) -> EncodedSample:
        """A sample whose image has been cut, in the calling thread and whatever is kept."""
        return self._encoded_sample(prepared, self._image_features(prepared))

    def forget(self) -> None:
        """Drops what is kept."""
        self._kept.clear()
        self.num_bytes = 0
        self._features_of_image.clear()

    def _keep(self, key: tuple[str, str], encoded: EncodedSample) -> None:
        self._kept[key] = encoded
        self.num_bytes += encoded.num_bytes
        while self.num_bytes > self.cache_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def _features_together(
        self, samples: Sequence[ExecutorRequest], tier: str
    ) -> Iterator[tuple[ExecutorRequest, PreparedSample, str, torch.Tensor]]:
        """Each sample with its inputs, its image's digest and features: several images in a pass of the tower."""
        # A few at a time, so that not all pixels are in memory at once.
        size = max(8, 4 * self.num_workers)
        for group in (samples[start : start + size] for start in range(0, len(samples), size)):
            images = [sample.load_image() for sample in group]
            prepared = [self.prepare(sample, image, tier) for sample, image in zip(group, images, strict=True)]
            digests = [f"{tier} {_digest(image)}" for image in images]
            features = {digest: self._features_of_image.get(digest) for digest in digests}
            unseen = {digest: one for digest, one in zip(digests, prepared, strict=True) if features[digest] is None}
            if len(unseen) == 1:
                features.update({digest: self._image_features(one) for digest, one in unseen.items()})
            elif unseen:
                found = do_or_split(self._features_of_images, list(unseen.values()), "images", self.device)
                features.update(zip(unseen, found, strict=True))
            for sample, one, digest in zip(group, prepared, digests, strict=True):
                yield sample, one, digest, features[digest]

    def _features_each(
        self, samples: Sequence[ExecutorRequest], tier: str
    ) -> Iterator[tuple[ExecutorRequest, PreparedSample, str, torch.Tensor]]:
        """As `_features_together`, but each image goes through the tower by itself, since the rounding of a batch may
        depend on its size, while the next ones are cut in this thread: the tokenizer cannot be used by two."""
        with ThreadPoolExecutor(self.num_workers) as pool:
            waiting: deque[tuple[ExecutorRequest, PreparedSample, str, Future | torch.Tensor]] = deque()

            def first_waiting() -> tuple[ExecutorRequest, PreparedSample, str, torch.Tensor]:
                sample, prepared, digest, features = waiting.popleft()
                return sample, prepared, digest, features.result() if isinstance(features, Future) else features

            for sample in samples:
                image = sample.load_image()
                prepared, digest = self.prepare(sample, image, tier), f"{tier} {_digest(image)}"
                features = self._features_of_image.get(digest)
                if features is None:
                    # Of an image that is being encoded for another question.
                    features = next((future for *_, other, future in waiting if other == digest), None)
                if features is None:
                    features = pool.submit(self._image_features, prepared)
                waiting.append((sample, prepared, digest, features))
                # No more than a few, so that not all pixels are in memory at once.
                if len(waiting) > 2 * self.num_workers:
                    yield first_waiting()
            while waiting:
                yield first_waiting()

    @torch.inference_mode()  # entered by each thread for itself
    def _image_features(self, prepared: PreparedSample) -> torch.Tensor:
        """Features of one image that enter the sequence: `(N, hidden)`."""
        features = self.inference.image_features(prepared.pixel_values, prepared.image_masks)
        return features.flatten(0, 1)[prepared.layout.places]

    def _features_of_images(self, several: Sequence[PreparedSample]) -> list[torch.Tensor]:
        """As `_image_features`, for several images: their views share passes of the tower."""
        features = self.inference.features_of_images([(one.pixel_values, one.image_masks) for one in several])
        return [
            its_features.flatten(0, 1)[one.layout.places] for one, its_features in zip(several, features, strict=True)
        ]

    def _encoded_sample(self, prepared: PreparedSample, image_features: torch.Tensor) -> EncodedSample:
        # Copies from ordinary memory are safe without waiting, and waiting would stop the tower's next image.
        prompt_ids = torch.tensor(prepared.prompt_ids).to(self.device, non_blocking=True)
        return EncodedSample(
            input_ids=torch.cat([prepared.layout.ids, prompt_ids]),
            image_features=image_features,
            image_input_idx=prepared.layout.positions,
            counts=prepared.counts,
        )


def _digest(image: Image.Image) -> str:
    """A digest of an image: of all that its pixels come from."""
    about = (
        image.mode,
        image.size,
        image.getpalette(),
        image.info.get("transparency"),
        image.getexif().get(ExifTags.Base.Orientation),
    )
    # Not SHA-256, which takes half a millisecond for 640x480 pixels, forty times as long.
    digest = xxhash.xxh3_128(repr(about).encode())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()

"""The images and questions that the embedded executor is trained and measured on."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from datasets import Image as DatasetsImage
from PIL import Image
from torch.utils.data import Dataset

from ...data import SCENE_FAMILIES, Scene, generate_scene, load_vqa_dataset, scene_seed
from .packing import AskedImage, Packer


def easy_vqa_images(split: str) -> list[AskedImage]:
    """The images of a split of easy-vqa, each with all of its questions."""
    images: dict[str, AskedImage] = {}
    for row in load_vqa_dataset("easy_vqa", split).cast_column("image", DatasetsImage(decode=False)):
        path = row["image"]["path"]
        if path not in images:
            images[path] = AskedImage(Image.open(path).convert("RGB"), [])
        images[path].questions.append((row["question"], row["answers"][0], row["question_type"]))
    return list(images.values())


def scene(split: str, index: int, family: str = "scenes") -> AskedImage:
    """A scene of a split of a family with one question of every type that it allows."""
    sizes, types = SCENE_FAMILIES[family].image_sizes, SCENE_FAMILIES[family].question_types
    return _asked(generate_scene(scene_seed(split, index), image_sizes=sizes, question_types=types))


def _asked(drawn: Scene) -> AskedImage:
    return AskedImage(drawn.image, [(asked.question, asked.answer, asked.question_type) for asked in drawn.questions])


def scene_sizes(transfer_share: float) -> dict[tuple[int, int], float]:
    """Sizes of the images of all families, with their shares where the images of `scenes_transfer` make up
    `transfer_share`."""
    shares = {"scenes": 1 - transfer_share, "scenes_transfer": transfer_share}
    return {
        size: share * of_family
        for family, of_family in shares.items()
        for size, share in SCENE_FAMILIES[family].image_sizes.items()
    }


class TrainingScenes(Dataset):
    """The scenes of a whole training in their order, each drawn when it is asked for, with questions of all types. Those of
    a batch have one size: first there is a batch of each size, then sizes are drawn by their shares. The first scenes are
    drawn 1 to `largest_size_scale` times as large as those of the test; after `curriculum_share` of them all have the size
    of the test's."""

    def __init__(
        self,
        packer: Packer,
        num_batches: int,
        batch_size: int,
        sizes: Mapping[tuple[int, int], float],
        largest_size_scale: float,
        curriculum_share: float,
        seed: int,
    ):
        self.packer = packer
        self.batch_size = batch_size
        self.largest_size_scale = largest_size_scale
        self.curriculum_share = curriculum_share
        drawn = random.Random(seed).choices(list(sizes), list(sizes.values()), k=num_batches - len(sizes))
        self.sizes = [*sizes, *drawn]

    def __len__(self) -> int:
        return len(self.sizes) * self.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        enlarged = max(0.0, 1 - index / (self.curriculum_share * len(self))) * (self.largest_size_scale - 1)
        size_scale = 1 + random.Random(index).random() * enlarged
        size = self.sizes[index // self.batch_size]
        return self.packer.pack(_asked(generate_scene(scene_seed("executor", index), size_scale, {size: 1.0})))


class Pool:
    """The latest packed images on the training device, from which the images of a step are chosen."""

    def __init__(self, size: int, device: torch.device):
        self.size = size
        self.device = device
        self.num_added = 0
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, packed: dict[str, torch.Tensor]) -> None:
        """Adds packed images, each tensor with the images as first axis, in place of the oldest."""
        for name, tensor in packed.items():
            if name not in self.tensors:
                self.tensors[name] = torch.empty(self.size, *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
            positions = torch.arange(self.num_added, self.num_added + len(tensor), device=self.device) % self.size
            self.tensors[name][positions] = tensor.to(self.device, non_blocking=True)
        self.num_added += len(tensor)

    def sample(self, num_images: int) -> dict[str, torch.Tensor]:
        """Packed images chosen at random."""
        chosen = torch.randint(min(self.num_added, self.size), (num_images,), device=self.device)
        return {name: tensor[chosen] for name, tensor in self.tensors.items()}


def load_splits(split: str, num_images: int) -> dict[str, list[AskedImage]]:
    """The first images of a split of each data set."""
    scenes = {family: [scene(split, index, family) for index in range(num_images)] for family in SCENE_FAMILIES}
    return {**scenes, "easy_vqa": easy_vqa_images(split)[:num_images]}


def describe_questions(asked_images: Sequence[AskedImage]) -> dict[str, dict[str, float]]:
    """For each question type the number of questions and the share of the most frequent answer, which is a baseline."""
    answers: dict[str, Counter] = {}
    for asked in asked_images:
        for _, answer, question_type in asked.questions:
            answers.setdefault(question_type, Counter())[answer] += 1
    return {
        question_type: {"count": counts.total(), "baseline": counts.most_common(1)[0][1] / counts.total()}
        for question_type, counts in sorted(answers.items())
    }

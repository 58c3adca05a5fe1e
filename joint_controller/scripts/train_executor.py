"""
Trains a small Molmo from scratch: the executor that ships with this package.

    joint-controller train-executor --config recipes/embedded_executor/train.yaml

Every image is asked several questions at once, packed into one sequence (see `molmo/packing.py`). Answers are one word;
the loss covers the answer and the end-of-sequence token.

Scenes are drawn while the model trains, by worker processes, and none is kept for long: small shapes and digits are not
learnt from a fixed set of images. Early scenes are drawn larger than later ones.
"""

import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from datasets import Image as DatasetsImage
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm
from transformers import CLIPVisionConfig, GenerationConfig, OlmoeConfig, get_cosine_schedule_with_warmup, set_seed

from ..data import generate_scene, load_vqa_dataset, scene_seed, vocabulary
from ..knobs import TIERS, KnobSpace
from ..molmo import (
    MolmoConfig,
    MolmoForConditionalGeneration,
    MolmoImageProcessor,
    MolmoProcessor,
    build_word_tokenizer,
)
from ..molmo.blocks import save_importance
from ..molmo.embedded.card import build_executor_card
from ..molmo.embedded.experts import use_dense_experts
from ..molmo.embedded.packed_accuracy import measure_knobs, measure_settings, score_blocks
from ..molmo.embedded.packing import AskedImage, Packer, TierLayout, cut_views, segment_logits
from . import ScriptParser, run_script


@dataclass
class TrainExecutorArguments:
    """
    Arguments of `joint-controller train-executor`.

    The defaults are those of the executor that ships with the package, but for the number of steps: a trial run.
    """

    output_dir: str = field(default="executor", metadata={"help": "Folder for the weights, the log and the results."})
    seed: int = field(default=42, metadata={"help": "Seed of weights, scenes and order."})
    # Architecture
    view_size: int = field(default=32, metadata={"help": "Side of one square view (global view or crop), in pixels."})
    patch_size: int = field(default=4, metadata={"help": "Side of a patch of the vision tower, in pixels."})
    overlap_margins: list[int] = field(
        default_factory=lambda: [2, 0],
        metadata={"help": "Patches that a crop shares with its left and right neighbour."},
    )
    max_crops: int = field(default=9, metadata={"help": "Most crops an image is cut into, the global view apart."})
    vision_hidden_size: int = field(default=128, metadata={"help": "Width of the vision tower."})
    vision_num_blocks: int = field(default=6, metadata={"help": "Blocks of the vision tower."})
    vision_num_heads: int = field(default=4, metadata={"help": "Attention heads of the vision tower."})
    vit_layers: list[int] = field(
        default_factory=lambda: [-1, -4], metadata={"help": "Blocks of the vision tower that the connector reads."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width of the language model."})
    num_blocks: int = field(default=8, metadata={"help": "Blocks of the language model."})
    num_heads: int = field(default=6, metadata={"help": "Attention heads of the language model."})
    num_experts: int = field(default=16, metadata={"help": "Experts of a block."})
    expert_size: int = field(default=64, metadata={"help": "Inner width of an expert."})
    top_k: int = field(default=8, metadata={"help": "Experts per token, in training and at the full setting."})
    projector_size: int = field(default=384, metadata={"help": "Inner width of the connector's projection."})
    knob_top_k: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8],
        metadata={"help": "Values of the knob `top_k` that the checkpoint offers."},
    )
    knob_num_blocks: list[int] = field(
        default_factory=lambda: [4, 5, 6, 8],
        metadata={"help": "Values of the knob `num_blocks` that the checkpoint offers."},
    )
    # Data
    scenes_per_step: int = field(default=224, metadata={"help": "Scenes in a step."})
    easy_vqa_images_per_step: int = field(default=32, metadata={"help": "Images of easy-vqa in a step."})
    questions_per_image: int = field(default=8, metadata={"help": "Most questions asked about an image in a step."})
    steps_per_new_scenes: int = field(
        default=3, metadata={"help": "Steps for each step's worth of newly drawn scenes; the rest come from the pool."}
    )
    pool_size: int = field(default=50_000, metadata={"help": "Latest scenes that a step's scenes are chosen from."})
    num_workers: int = field(default=8, metadata={"help": "Processes that draw scenes; 0 draws in the main process."})
    largest_size_scale: float = field(
        default=2.0, metadata={"help": "The first scenes are drawn up to this much larger than those of the test."}
    )
    curriculum_share: float = field(
        default=0.3, metadata={"help": "Share of the training after which all scenes have the size of the test's."}
    )
    tier_shares: list[float] = field(
        default_factory=lambda: [0.2, 0.2, 0.6], metadata={"help": "Shares of the steps at tiers low, medium, high."}
    )
    # Optimisation
    max_steps: int = field(default=2_000, metadata={"help": "Optimiser steps."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate; a cosine takes it to 0."})
    warmup_steps: int = field(default=500, metadata={"help": "Steps over which the learning rate rises."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's second beta."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    effective_experts: float = field(
        default=7.6,
        metadata={
            "help": "Experts that a token's weights are worth (the exponential of their entropy) below which routing is "
            "penalised. Without it each token ends up with one expert, and `top_k` costs nothing and gains nothing."
        },
    )
    routing_loss_weight: float = field(
        default=0.1, metadata={"help": "Weight of the squared shortfall of that entropy, summed over blocks."}
    )
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 autocast (on a GPU)."})
    compile: bool = field(
        default=False,
        metadata={"help": "Compile the blocks and record steps as CUDA graphs (GPU only; takes a minute)."},
    )
    # Evaluation
    logging_steps: int = field(default=50, metadata={"help": "Steps between two lines of the log."})
    eval_steps: int = field(default=1_000, metadata={"help": "Steps between two evaluations (and checkpoints)."})
    eval_images: int = field(default=256, metadata={"help": "Images of each validation split."})
    test_images: int = field(default=1_000, metadata={"help": "Images of each test split; easy-vqa has 1,000."})
    eval_batch_size: int = field(default=250, metadata={"help": "Images in a batch of the evaluation."})


# ---- model ----------------------------------------------------------------------------------------------------------


def build_processor(args: TrainExecutorArguments) -> MolmoProcessor:
    """Processor of the executor: its image geometry, and a tokenizer of the words that the two data sets use."""
    easy_vqa = load_vqa_dataset("easy_vqa", "train")
    answers = {answer for answers in easy_vqa["answers"] for answer in answers}
    words = {word for text in [*easy_vqa["question"], *answers] for word in text.rstrip("?").split()}
    tokenizer = build_word_tokenizer(sorted(words | {"?"} | set(vocabulary())))
    image_processor = MolmoImageProcessor(
        base_image_input_size=[args.view_size, args.view_size],
        image_patch_size=args.patch_size,
        image_token_length_h=args.view_size // args.patch_size // 2,
        image_token_length_w=args.view_size // args.patch_size // 2,
        overlap_margins=args.overlap_margins,
        max_crops=args.max_crops,
    )
    return MolmoProcessor(image_processor, tokenizer)


def build_model(args: TrainExecutorArguments, processor: MolmoProcessor) -> MolmoForConditionalGeneration:
    """A model with random weights."""
    tokenizer = processor.tokenizer
    text_config = OlmoeConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.expert_size,
        num_hidden_layers=args.num_blocks,
        num_attention_heads=args.num_heads,
        num_experts=args.num_experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=1024,
        # 0.02, the default, is meant for widths of thousands: products of narrow matrices would start out too small.
        initializer_range=args.hidden_size**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=args.vision_hidden_size,
        intermediate_size=4 * args.vision_hidden_size,
        num_hidden_layers=args.vision_num_blocks,
        num_attention_heads=args.vision_num_heads,
        image_size=args.view_size,
        patch_size=args.patch_size,
        initializer_range=args.vision_hidden_size**-0.5,
    )
    knob_space = KnobSpace(
        {"low": (1, 3), "medium": (4, 8), "high": (9, args.max_crops)}, args.knob_top_k, args.knob_num_blocks
    )
    config = MolmoConfig(
        text_config=text_config,
        vision_config=vision_config,
        additional_vocab_size=len(tokenizer) - tokenizer.vocab_size,
        vit_layers=args.vit_layers,
        projector_intermediate_size=args.projector_size,
        max_crops=args.max_crops,
        overlap_margins=args.overlap_margins,
        knob_space=knob_space.to_dict(),
        initializer_range=args.vision_hidden_size**-0.5,
    )
    return MolmoForConditionalGeneration(config)


# ---- data -----------------------------------------------------------------------------------------------------------


def easy_vqa_images(split: str) -> list[AskedImage]:
    """The images of a split of easy-vqa, each with all of its questions."""
    images: dict[str, AskedImage] = {}
    for row in load_vqa_dataset("easy_vqa", split).cast_column("image", DatasetsImage(decode=False)):
        path = row["image"]["path"]
        if path not in images:
            images[path] = AskedImage(Image.open(path).convert("RGB"), [])
        images[path].questions.append((row["question"], row["answers"][0], row["question_type"]))
    return list(images.values())


def scene(split: str, index: int, size_scale: float = 1.0) -> AskedImage:
    """A scene of a split with one question of every type that it allows."""
    drawn = generate_scene(scene_seed(split, index), size_scale)
    return AskedImage(drawn.image, [(asked.question, asked.answer, asked.question_type) for asked in drawn.questions])


class TrainingScenes(Dataset):
    """
    The scenes of a whole training in their order, larger ones first, each drawn when it is asked for.

    Args:
        packer ([`Packer`]):
            Packs the questions.
        num_scenes (`int`):
            Scenes in the training.
        largest_size_scale (`float`):
            The first scenes are drawn 1 to this many times as large as those of the test.
        curriculum_share (`float`):
            Share of the scenes after which all have the size of the test's.
    """

    def __init__(self, packer: Packer, num_scenes: int, largest_size_scale: float, curriculum_share: float):
        self.packer = packer
        self.num_scenes = num_scenes
        self.largest_size_scale = largest_size_scale
        self.curriculum_share = curriculum_share

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        enlarged = max(0.0, 1 - index / (self.curriculum_share * self.num_scenes)) * (self.largest_size_scale - 1)
        return self.packer.pack(scene("executor", index, 1 + random.Random(index).random() * enlarged))


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


# ---- training -------------------------------------------------------------------------------------------------------


def save_executor(model: MolmoForConditionalGeneration, processor: MolmoProcessor, folder: Path) -> None:
    """Writes weights in bfloat16, configuration, generation settings and processor."""
    rounded = MolmoForConditionalGeneration(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        max_new_tokens=16,
    )
    rounded.save_pretrained(folder)
    processor.save_pretrained(folder)


Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(pixel_values, segments, labels) → (loss, routing loss), of shape `(2,)`; adds to the parameters' gradients."""


def make_step(args: TrainExecutorArguments, model: MolmoForConditionalGeneration, layout: TierLayout) -> Step:
    """Forward and backward pass at a tier."""
    blocks = model.model.language_model.layers

    def step(pixel_values: torch.Tensor, segments: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            logits = segment_logits(model, layout, segments, pixel_values=pixel_values)
        loss = F.cross_entropy(logits.float().flatten(0, 2), labels.flatten())
        entropies = torch.stack([block.mlp.experts.routing_entropy for block in blocks])  # (blocks, tokens)
        routing_loss = (math.log(args.effective_experts) - entropies).relu().square().mean(1).sum()
        (loss + args.routing_loss_weight * routing_loss).backward()
        for block in blocks:
            block.mlp.experts.routing_entropy = None  # keeps the whole graph of the step alive
        return torch.stack([loss.detach(), routing_loss.detach()])

    return step


def capture_step(step: Step, inputs: Sequence[torch.Tensor]) -> Step:
    """Records a step as one CUDA graph: its many small kernels take the host longer to launch than the GPU to run."""
    inputs = [tensor.clone() for tensor in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and chooses kernels
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step(*inputs)

    def replay(*new_inputs: torch.Tensor) -> torch.Tensor:
        for tensor, new in zip(inputs, new_inputs, strict=True):
            tensor.copy_(new)
        graph.replay()
        return losses.clone()

    return replay


def train(
    args: TrainExecutorArguments,
    model: MolmoForConditionalGeneration,
    processor: MolmoProcessor,
    validation: Mapping[str, Sequence[AskedImage]],
) -> None:
    """Trains the model in place; writes a checkpoint and lines of `log.jsonl` on the way."""
    model.train()
    device = model.device
    output_dir = Path(args.output_dir)
    rng = random.Random(args.seed)
    packer = Packer(processor, args.questions_per_image)

    easy_vqa = easy_vqa_images("train")
    easy_vqa_pool = Pool(3 * len(easy_vqa), device)
    for _ in range(3):  # an image has more questions than are asked at once
        for asked in easy_vqa:
            rng.shuffle(asked.questions)
        easy_vqa_pool.add(default_collate([packer.pack(asked) for asked in easy_vqa]))
    scene_pool = Pool(args.pool_size, device)
    num_new = -(-args.max_steps // args.steps_per_new_scenes)
    scenes = TrainingScenes(packer, num_new * args.scenes_per_step, args.largest_size_scale, args.curriculum_share)
    new_scenes = iter(DataLoader(scenes, args.scenes_per_step, num_workers=args.num_workers))

    def draw(tier: str) -> list[torch.Tensor]:
        batches = [scene_pool.sample(args.scenes_per_step), easy_vqa_pool.sample(args.easy_vqa_images_per_step)]
        views = [cut_views(batch["images"], layouts[tier].tiling, model.config) for batch in batches]
        return [
            torch.cat(tensors) for tensors in (views, *([b[name] for b in batches] for name in ("segments", "labels")))
        ]

    layouts = {tier: TierLayout.of(packer, tier, device) for tier in TIERS}
    steps = {tier: make_step(args, model, layout) for tier, layout in layouts.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # a recorded step adds to these very tensors
    scene_pool.add(next(new_scenes))
    if args.compile:
        torch._dynamo.config.recompile_limit = 16  # a module is compiled once for each tier
        for module in [*model.model.vision_tower.encoder.layers, *model.model.language_model.layers]:
            module.compile(dynamic=False)
        steps = {tier: capture_step(step, draw(tier)) for tier, step in steps.items()}

    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, args.adam_beta2),
        fused=device.type == "cuda",
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.max_steps)

    started = time.monotonic()
    losses = []
    progress = tqdm(range(1, args.max_steps + 1), desc="training", disable=None)
    for step in progress:
        if step > 1 and (step - 1) % args.steps_per_new_scenes == 0:
            scene_pool.add(next(new_scenes))
        tier = rng.choices(TIERS, args.tier_shares)[0]
        optimizer.zero_grad(set_to_none=False)
        losses.append(steps[tier](*draw(tier)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()

        is_evaluated = step % args.eval_steps == 0 or step == args.max_steps
        if is_evaluated or step % args.logging_steps == 0:
            loss, routing_loss = torch.stack(losses).mean(0).tolist()
            seconds = round(time.monotonic() - started, 1)
            line = {"step": step, "seconds": seconds, "loss": loss, "routing_loss": routing_loss}
            losses.clear()
            progress.set_postfix(loss=f"{loss:.3f}")
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {step}: lower `learning_rate`.")
            if is_evaluated:
                line["accuracy"] = measure_knobs(model, processor, validation, args.eval_batch_size)
                save_executor(model, processor, output_dir)
            with open(output_dir / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def make_parser() -> ScriptParser:
    return ScriptParser([TrainExecutorArguments])


def main(args: TrainExecutorArguments) -> None:
    output_dir = Path(args.output_dir)
    if (output_dir / "log.jsonl").exists():
        raise ValueError(f"output_dir '{output_dir}' holds another training: choose another folder or remove it.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.compile and device.type != "cuda":
        raise ValueError("`compile` is set but there is no GPU: train with `--compile false`.")
    if not 1 <= args.effective_experts <= args.top_k:
        raise ValueError(f"`effective_experts` is {args.effective_experts}: give 1 to `top_k`, which is {args.top_k}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    processor = build_processor(args)
    model = build_model(args, processor).to(device)
    use_dense_experts(model)
    started = time.monotonic()
    train(args, model, processor, load_splits("validation", args.eval_images))

    training_seconds = round(time.monotonic() - started)

    # What is measured is what users get: weights rounded to bfloat16, computed with in float32.
    model = MolmoForConditionalGeneration.from_pretrained(output_dir, dtype=torch.float32).to(device).eval()
    use_dense_experts(model)
    validation, test = (load_splits(split, args.test_images) for split in ("validation", "test"))
    importance = score_blocks(model, processor, validation, args.eval_batch_size)
    provenance = {
        "measured_as": "accuracy lost when the block is left out at the full setting, averaged over question types",
        "data": "validation splits of scenes and easy_vqa",
        "images_per_data_set": args.test_images,
    }
    save_importance(output_dir / "importance.json", importance, provenance)
    results = {
        "arguments": asdict(args),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "training_seconds": training_seconds,
        "num_parameters": model.num_parameters(),
        "questions": {name: describe_questions(asked_images) for name, asked_images in test.items()},
        "settings": measure_settings(model, processor, test, importance, args.eval_batch_size),
    }
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    log = [json.loads(line) for line in (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    (output_dir / "README.md").write_text(build_executor_card(results, log, importance), encoding="utf-8")


def load_splits(split: str, num_images: int) -> dict[str, list[AskedImage]]:
    """The first images of a split of each data set."""
    return {
        "scenes": [scene(split, index) for index in range(num_images)],
        "easy_vqa": easy_vqa_images(split)[:num_images],
    }


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


if __name__ == "__main__":
    sys.exit(run_script("train-executor", make_parser, main))

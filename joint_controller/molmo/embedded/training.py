"""
The training of the embedded executor.

Every image is asked several questions at once, packed into one sequence (see `packing.py`). Answers are one word; the loss
covers the answer and the end-of-sequence token.

Scenes are drawn while the model trains, by worker processes, and none is kept for long: small shapes and digits are not
learnt from a fixed set of images. Early scenes are drawn larger than later ones. The images of a step have one size, and a
step runs at one tier: its tensors have one of few shapes, for each of which it is recorded once.
"""

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from .. import MolmoForConditionalGeneration, MolmoProcessor
from ..knob_space import TIERS
from .arguments import TrainExecutorArguments
from .data import Pool, TrainingScenes, easy_vqa_images, scene_sizes
from .model import save_executor
from .packed_accuracy import measure_knobs
from .packing import AskedImage, PackedLayout, Packer, segment_logits


Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(pixel_values, segments, labels) → (loss, routing loss), of shape `(2,)`; adds to the parameters' gradients."""


def make_step(args: TrainExecutorArguments, model: MolmoForConditionalGeneration, layout: PackedLayout) -> Step:
    """Forward and backward pass on images of one size at a tier."""
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


def capture_step(step: Step, inputs: Sequence[torch.Tensor], memory_pool: tuple[int, int]) -> Step:
    """Records a step as one CUDA graph: its many small kernels take the host longer to launch than the GPU to run. Steps
    never run at the same time, so all may use the same memory."""
    inputs = [tensor.clone() for tensor in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and chooses kernels
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory_pool):
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

    sizes = scene_sizes(args.transfer_share)
    # Images of each size, and the share of steps on them. Those of easy-vqa are of one size too.
    shares = {size: (1 - args.easy_vqa_share) * share for size, share in sizes.items()}
    pools = {size: Pool(max(args.images_per_step, round(args.pool_size * sizes[size])), device) for size in sizes}
    easy_vqa = easy_vqa_images("train")
    [easy_vqa_size] = {asked.image.size for asked in easy_vqa}
    shares[easy_vqa_size] = args.easy_vqa_share
    pools[easy_vqa_size] = Pool(3 * len(easy_vqa), device)
    for _ in range(3):  # an image has more questions than are asked at once
        for asked in easy_vqa:
            rng.shuffle(asked.questions)
        pools[easy_vqa_size].add(default_collate([packer.pack(asked) for asked in easy_vqa]))
    scenes = TrainingScenes(
        packer,
        len(sizes) + -(-args.max_steps // args.steps_per_new_scenes),
        args.images_per_step,
        sizes,
        args.largest_size_scale,
        args.curriculum_share,
        args.seed,
    )
    new_scenes = zip(
        scenes.sizes, DataLoader(scenes, args.images_per_step, num_workers=args.num_workers), strict=False
    )

    def add_scenes() -> None:
        size, packed = next(new_scenes)
        pools[size].add(packed)

    def draw(size: tuple[int, int], tier: str) -> list[torch.Tensor]:
        batch = pools[size].sample(args.images_per_step)
        return [layouts[size, tier].cut(batch["images"]), batch["segments"], batch["labels"]]

    layouts = {(size, tier): PackedLayout.of(packer, size, tier, device) for size in pools for tier in TIERS}
    steps = {key: make_step(args, model, layout) for key, layout in layouts.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # a recorded step adds to these very tensors
    for _ in sizes:
        add_scenes()
    if args.compile:
        for module in [*model.model.vision_tower.encoder.layers, *model.model.language_model.layers]:
            module.compile(dynamic=True)  # once for all shapes: to compile for each would take longer than it saves
        memory_pool = torch.cuda.graph_pool_handle()
        progress = tqdm(steps.items(), desc="recording", disable=None)
        steps = {key: capture_step(step, draw(*key), memory_pool) for key, step in progress}

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
            add_scenes()
        [size] = rng.choices(list(shares), list(shares.values()))
        [tier] = rng.choices(TIERS, args.tier_shares)
        optimizer.zero_grad(set_to_none=False)
        losses.append(steps[size, tier](*draw(size, tier)))
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

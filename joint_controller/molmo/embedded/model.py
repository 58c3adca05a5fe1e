"""The embedded executor's model and processor, before training, and how they are saved after it."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, GenerationConfig, OlmoeConfig

from ...data import load_vqa_dataset, vocabulary
from ...executor import EMBEDDED, embedded_executor_path
from .. import MolmoConfig, MolmoForConditionalGeneration, MolmoImageProcessor, MolmoProcessor, build_word_tokenizer
from ..knob_space import build_knob_space
from .arguments import TrainExecutorArguments


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


def start_from(model: MolmoForConditionalGeneration, processor: MolmoProcessor, path: str | Path) -> None:
    """
    Copies the weights of an executor in a folder (or of the one that ships: `"embedded"`) into a model, in place. The tables
    of words are copied word by word; a word that the other executor does not know keeps its random weights.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the other executor has another architecture.
    """
    path = embedded_executor_path() if str(path) == EMBEDDED else Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"`initial_model`: there is no folder '{path}'. Give that of an executor, or `{EMBEDDED}` for the one that ships."
        )
    other = MolmoForConditionalGeneration.from_pretrained(path, dtype=model.dtype).state_dict()
    other_words = MolmoProcessor.from_pretrained(path).tokenizer.get_vocab()
    rows = [(row, other_words[word]) for word, row in processor.tokenizer.get_vocab().items() if word in other_words]
    for name, value in model.state_dict().items():
        if name.endswith(("base_embedding", "lm_head.weight")):
            known = [
                (row, other_row) for row, other_row in rows if max(row - len(value), other_row - len(other[name])) < 0
            ]
            to, of = torch.tensor(known).T
            value[to] = other[name][of]
        elif other.get(name) is None or other[name].shape != value.shape:
            raise ValueError(
                f"the executor in '{path}' has no weights '{name}' of shape {tuple(value.shape)}: start from one "
                "of the same architecture."
            )
        else:
            value.copy_(other[name])


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
    tier_crops = {"low": (1, 3), "medium": (4, 8), "high": (9, args.max_crops)}
    knob_space = build_knob_space(tier_crops, args.knob_top_k, args.knob_num_blocks)
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

"""A results folder in the layout of the original profiling scripts, with times and answers that follow from formulas."""

import itertools
import json
from pathlib import Path


TIER_RANGES = {"low": (1, 3), "medium": (4, 8), "high": (9, 15)}
TIER_CROPS = {"low": 2, "medium": 6, "high": 12}
TOP_K = (4, 8)
NUM_BLOCKS = (12, 16)


def prefill_ms(tier, num_blocks):
    return 10.0 + 4.0 * TIER_CROPS[tier] + 2.0 * num_blocks


def decode_ms(top_k, num_blocks):
    return 2.0 + num_blocks * (0.4 + 0.05 * top_k)


def make_entry(number, tier, top_k, num_blocks):
    """Sample `number` asks for a colour, and is answered from the tier, the top_k or the blocks on, by turns."""
    is_answered = (tier == "high", top_k == 8, num_blocks == 16)[number % 3]
    vision_ms, output_tokens = 2.0 + 2.0 * TIER_CROPS[tier], 2 + number % 2
    per_token = decode_ms(top_k, num_blocks)
    llm_prefill_ms = prefill_ms(tier, num_blocks) - vision_ms
    vision_tokens, text_tokens = 144 * (TIER_CROPS[tier] + 1), 20 + number
    return {
        "sample_id": number,
        "tier": tier,
        "tier_range": dict(zip(("min_crops", "max_crops"), TIER_RANGES[tier], strict=True)),
        "top_k": top_k,
        "num_active_blocks": num_blocks,
        "output_tokens": output_tokens,
        "content_tokens": output_tokens - 1,
        "ends_with_eos": True,
        "actual_num_crops": TIER_CROPS[tier],
        "target_vision_tokens": vision_tokens,
        "actual_vision_tokens": vision_tokens,
        "actual_text_tokens": text_tokens,
        "total_sequence_length": vision_tokens + text_tokens,
        "accuracy": 1.0 if is_answered else 0.0,
        "pred": "red" if is_answered else "blue",
        "metadata": {
            "question": f"What color is number {number}?",
            "answers": ["red"] * 10,
            "image_id": 1000 + number,
        },
        "T_vision_total": vision_ms,
        "T_LLM_prefill": llm_prefill_ms,
        "T_LLM_decode": output_tokens * per_token,
        "T_total": vision_ms + llm_prefill_ms + output_tokens * per_token,
        "T_decode_per_token": per_token,
    }


def write_results(root: Path, dataset_folders=("text-vqa", "coco-2014-vqa"), num_samples=6, change=None) -> Path:
    """Writes a results folder; `change(folder name, entry)` may alter an entry, or drop it by returning None."""
    for folder_name in dataset_folders:
        folder = root / folder_name
        folder.mkdir(parents=True)
        for tier, top_k, num_blocks in itertools.product(TIER_CROPS, TOP_K, NUM_BLOCKS):
            entries = [make_entry(number, tier, top_k, num_blocks) for number in range(num_samples)]
            if change is not None:
                entries = [changed for entry in entries if (changed := change(folder_name, entry)) is not None]
            summary = {"tier": tier, "top_k": top_k, "num_active_blocks": num_blocks, "num_samples": len(entries)}
            path = file_of(root, folder_name, tier, top_k, num_blocks)
            path.write_text(json.dumps({"summary": [summary], "per_sample_results": entries}))
    return root


def file_of(root: Path, folder_name, tier="low", top_k=4, num_blocks=12) -> Path:
    crops = TIER_CROPS[tier]
    name = f"{folder_name}_imgsizetier-{tier}_crops{crops}_topk{top_k}_blocks{num_blocks}.json"
    return root / folder_name / name

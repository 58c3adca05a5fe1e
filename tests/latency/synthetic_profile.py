"""Profiles of machines whose true cost is a formula: a GPU, where bytes and arithmetic compete, and a CPU."""

import itertools
import json
import math

import torch

from joint_controller.latency import make_profile
from joint_controller.molmo import MolmoConfig
from joint_controller.molmo.knob_space import build_knob_space
from joint_controller.molmo.shape import molmo_shape


SPACE = build_knob_space({"low": (1, 3), "medium": (4, 8), "high": (9, 12)}, range(4, 9), range(12, 17))
WAY = {
    "device_type": "cpu",
    "device_name": "test device",
    "driver_version": "none",
    "num_threads": "3",
    "library_versions": "torch 2.11",
    "executor_dtype": "bfloat16",
    "executor_mode": "plain",
    "executor_revision": "0",
}
LENGTHS = [*range(64, 1024, 64), *range(1024, 4097, 128)]


def gpu_times(setting, num_views, num_tokens):
    """(vision, prefill, decode per token) in ms of a captured executor: prompts are padded, each stage is the larger of what
    it reads and what it works, and one kernel changes at 1,280 tokens."""
    top_k, num_blocks = setting["top_k"], setting["num_blocks"]
    padded = next(length for length in LENGTHS if length >= num_tokens)
    vision = 0.6 + 0.75 * num_views + 0.35 * max(0, num_views - 6)
    read, worked = 0.27 * (1 - (1 - top_k / 64) ** padded), padded * (6e-5 + 5e-5 * top_k) + 2e-8 * padded**2
    prefill = 0.4 + num_blocks * (0.06 + max(read, worked) + 0.04 * (padded > 1280))
    decode = 0.12 + num_blocks * (0.035 + 0.0045 * top_k + 4e-6 * num_tokens)
    return vision, prefill, decode


def cpu_times(setting, num_views, num_tokens):
    """The same of a CPU: arithmetic, and little else."""
    top_k, num_blocks = setting["top_k"], setting["num_blocks"]
    vision = 5 + 260 * num_views
    prefill = 20 + num_blocks * (8 + num_tokens * (0.11 + 0.07 * top_k) + 1.5e-5 * num_tokens**2)
    return vision, prefill, 6 + num_blocks * (2.1 + 1.3 * top_k + 9e-4 * num_tokens)


def preparation_times(image_pixels, num_views, num_tokens):
    """(overhead, controller, image processing) in ms of either."""
    return 0.15 + 2e-4 * num_tokens, 0.5, 0.1 + 3e-6 * image_pixels + 0.15 * num_views


def make_synthetic_profile(times, noise=0.01, num_inputs=12, seed=0, latency_scope="request", **columns):
    """
    All settings with `num_inputs` inputs, each with five repeats as wholes; times are those of `times` times a log-normal
    factor. In the scope of the model, what was not the model's is unknown.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = json.dumps(molmo_shape(MolmoConfig()))
    space = json.dumps(SPACE.to_dict())

    def noises(number):
        return torch.exp(noise * torch.randn(number, generator=generator))

    rows = []
    for setting, number in itertools.product(SPACE, range(num_inputs)):
        fewest, most = SPACE["tier"].meaning(setting["tier"])
        num_views = 1 + fewest + number % (most - fewest + 1)
        vision_tokens = 148 * num_views - 30 * (number % 3)
        text_tokens = round(10 * 10 ** ((number * 7 % num_inputs) / num_inputs))
        image_pixels = 10_000 * (1 + number * 5 % num_inputs) ** 2
        # Two decode steps see one and two tokens more than the prompt.
        true = times(setting, num_views, vision_tokens + text_tokens)
        decode_true = times(setting, num_views, vision_tokens + text_tokens + 1.5)[2]
        vision_ms, prefill_ms, decode_ms = (
            value * factor for value, factor in zip((*true[:2], decode_true), noises(3).tolist(), strict=True)
        )
        model_ms = (true[0] + true[1] + 2 * decode_true) * noises(5)
        preparation = torch.tensor(preparation_times(image_pixels, num_views, vision_tokens + text_tokens))
        overhead_ms, controller_ms, image_processing_ms = (preparation * noises(3)).tolist()
        whole = {
            "image_pixels": image_pixels,
            "overhead_ms": overhead_ms,
            "controller_ms": controller_ms,
            "image_processing_ms": image_processing_ms,
            "request_ms": (preparation.sum() * noises(5) + model_ms).tolist(),
            "model_ms": model_ms.tolist(),
        }
        rows.append(
            {
                "sample_id": f"made/{number}",
                **setting,
                "num_views": num_views,
                "vision_tokens": vision_tokens,
                "text_tokens": text_tokens,
                "output_tokens": 3,
                **(whole if latency_scope == "request" else {}),
                "vision_ms": vision_ms,
                "llm_prefill_ms": prefill_ms,
                "decode_ms_per_token": decode_ms,
                "repeats_disagree": False,
                **WAY,
                "device_name": times.__name__,
                "executor_fingerprint": "abc",
                "executor_type": "molmo",
                "executor_shape": shape,
                "knob_space": space,
                "latency_scope": latency_scope,
                "prefill_lengths": LENGTHS if times is gpu_times else None,
                **columns,
            }
        )
    assert all(math.isfinite(row["llm_prefill_ms"]) for row in rows)
    return make_profile(rows)

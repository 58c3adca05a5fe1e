import dataclasses

import pytest
from trl import GRPOConfig

from joint_controller import JointGRPOConfig


def make_config(tmp_path, **kwargs) -> JointGRPOConfig:
    return JointGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **kwargs)


def test_budgets_default_to_fractions_and_may_be_given_in_ms(tmp_path):
    config = make_config(tmp_path)
    assert (config.latency_budget_min_fraction, config.latency_budget_max_fraction) == (0.35, 1.0)
    config = make_config(tmp_path, latency_budget_min_ms=5.0, latency_budget_max_ms=20.0)
    assert (config.latency_budget_min_fraction, config.latency_budget_max_fraction) == (None, None)


def test_every_field_of_its_own_has_help():
    own = JointGRPOConfig.__annotations__
    without = [f.name for f in dataclasses.fields(JointGRPOConfig) if f.name in own and not f.metadata.get("help")]
    assert not without


def test_is_a_grpo_config_with_all_its_fields(tmp_path):
    config = make_config(tmp_path, loss_type="grpo", beta=0.1, num_iterations=2, save_steps=10, eval_steps=10)
    assert isinstance(config, GRPOConfig)
    assert (config.loss_type, config.beta, config.num_iterations) == ("grpo", 0.1, 2)
    assert (
        config.gradient_checkpointing is False
    )  # whatever a release of transformers makes of a field that is not set


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"latency_budget_min_ms": 5.0}, "only `latency_budget_min_ms` is set"),
        ({"latency_budget_min_fraction": 0.9, "latency_budget_max_fraction": 0.5}, "must be above 0 and below"),
        ({"latency_budget_min_ms": 0.0, "latency_budget_max_ms": 5.0}, "must be above 0 and below"),
        (
            {"latency_budget_min_ms": 5.0, "latency_budget_max_ms": 9.0, "latency_budget_max_fraction": 1.0},
            "are both set",
        ),
        ({"stage1_lr_ratio": -1.0}, "`stage1_lr_ratio` is -1.0"),
        ({"top_p": 0.9}, "`top_p` is 0.9, but it steers text generation"),
        ({"use_vllm": True}, "`use_vllm` is True, but it steers text generation"),
        ({"gradient_checkpointing": True}, "`gradient_checkpointing` is set"),
        ({"temperature": 0.0}, "`temperature` is 0.0: give a finite number above 0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"seed": -1}, "`seed` is -1: give 0 or more"),
        ({"reward_weights": [1.0, float("nan"), 1.0, 1.0, 1.0]}, "`reward_weights` is .* all must be finite"),
        ({"latency_budget_min_ms": 5.0, "latency_budget_max_ms": float("inf")}, "which must be finite"),
        ({"stage1_lr_ratio": float("nan")}, "`stage1_lr_ratio` is nan"),
        ({"beta": 0.1, "sync_ref_model": True}, "`sync_ref_model` is set"),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"eval_steps": 50}, "make them equal"),
        ({"num_iterations": 3, "eval_steps": 100, "save_steps": 100}, "a multiple of 3 optimiser steps"),
        ({"steps_per_generation": 8, "eval_steps": 20, "save_steps": 20}, "a multiple of 8 optimiser steps"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "do not divide each other"),
        ({"eval_steps": 0.1, "save_steps": 0.1}, "give a multiple of 1 optimiser steps"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **kwargs)

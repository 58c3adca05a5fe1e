"""A new reward, as docs/extending.md writes it."""

import json
import sys

import pytest
import yaml
from formula_world import make_collector, make_dataset, make_trainer
from pages import DOCS, code_blocks

from joint_controller.data import read_samples
from joint_controller.evaluation.baselines import StaticPolicy
from joint_controller.evaluation.sweep import sweep_budgets
from joint_controller.rewards import resolve_rewards, reward_names, total_reward


PAGE = DOCS / "extending.md"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The fields of the page's recipe, with the page's function where Python finds it."""
    [module] = code_blocks(PAGE, "python", "A new reward")
    [recipe] = code_blocks(PAGE, "yaml", "A new reward")
    (tmp_path / "my_rewards.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    yield yaml.safe_load(recipe)
    sys.modules.pop("my_rewards", None)


def test_it_is_named_by_its_path_and_weighted(recipe):
    rewards = resolve_rewards(recipe["reward_funcs"], recipe["reward_weights"])
    assert reward_names(rewards) == {
        "accuracy_reward": 1.0,
        "budget_violation_reward": 10.0,
        "my_rewards.short_answer": 0.02,
    }
    columns = {"accuracy": [1.0, 0.0], "latency_ms": [5.0, 20.0], "latency_budget_ms": [10.0, 10.0]}
    columns["answer"] = ["red", "a red star"]
    assert total_reward(rewards, columns) == pytest.approx([1 + 0.02, -10 + 0.02 / 3])


def test_training_and_sweep_take_it(recipe, tmp_path):
    rewards = resolve_rewards(recipe["reward_funcs"], recipe["reward_weights"])
    weights = list(rewards.values())
    trainer = make_trainer(tmp_path, reward_funcs=list(rewards), reward_weights=weights, max_steps=4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/short_answer/mean" in entry]
    assert logged and all(entry["rewards/short_answer/mean"] == 1.0 for entry in logged)

    outcomes = make_collector()
    samples = read_samples(make_dataset(8, "test"))
    full = StaticPolicy(outcomes.knob_space.full, "full")
    requests = sweep_budgets([full], outcomes, trainer.latency_estimator, samples, [30.0], 30.0, rewards)
    # Within the budget, every answer right and of one word.
    assert requests["reward"][:] == pytest.approx([1.02] * 8), json.dumps(recipe)

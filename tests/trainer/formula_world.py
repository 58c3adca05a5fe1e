"""A small world with known answers: every outcome and latency is a formula, so the best setting can be found by brute force."""

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from molmo_knobs import molmo_setting, molmo_space
from PIL import Image as PILImage

from joint_controller.controller import JointControllerConfig, JointControllerModel
from joint_controller.executor import ExecutorOutput
from joint_controller.knobs import KnobSetting
from joint_controller.latency import Guardrail
from joint_controller.outcomes import OutcomeCollector, OutcomeStore
from joint_controller.rewards import DEFAULT_REWARDS, total_reward
from joint_controller.trainer import JointGRPOConfig, JointGRPOTrainer


SPACE = molmo_space({"low": (1, 1), "medium": (4, 4), "high": (9, 9)}, top_k=(1, 2, 4), num_blocks=(4, 6, 8))
FULL_MS = 30.0
# The cheapest setting at which each kind of question is answered.
NEEDS = {
    "existence": molmo_setting("low", 1, 4),
    "digit": molmo_setting("high", 1, 4),
    "comparison": molmo_setting("low", 1, 8),
    "shape": molmo_setting("medium", 4, 6),
}
HIDDEN_SIZE = 16
COUNTS = {"num_views": 2, "vision_tokens": 16, "text_tokens": 8}
# Questions about digits are long, and predicted to take longer than they do.
LONG_TEXT_TOKENS = 12
UPPER_RATIOS = {0.95: 1.25, 0.99: 2.5}


def latency_of(setting: KnobSetting) -> float:
    """5 ms for the cheapest setting of SPACE, 30 ms for the full one; the tier and the blocks cost most."""
    tier, top_k, num_blocks = SPACE.normalized(setting)
    return 5.0 + 10.0 * tier + 5.0 * top_k + 10.0 * num_blocks


def predicted_ms(question_type: str, setting: KnobSetting, quantile: float = 0.95) -> float:
    """What a guardrail predicts not to be exceeded."""
    text_tokens = LONG_TEXT_TOKENS if question_type == "digit" else COUNTS["text_tokens"]
    return UPPER_RATIOS[quantile] * latency_of(setting) * text_tokens / COUNTS["text_tokens"]


def fits_of(question_type: str, budget_ms: float, quantile: float = 0.95) -> list[KnobSetting]:
    """Settings that a guardrail leaves."""
    fitting = [setting for setting in SPACE if predicted_ms(question_type, setting, quantile) <= budget_ms]
    return fitting or [SPACE.cheapest]


def is_answered(question_type: str, setting: KnobSetting) -> bool:
    needed = SPACE.normalized(NEEDS[question_type])
    return all(have >= need for have, need in zip(SPACE.normalized(setting), needed, strict=True))


class FormulaExecutor:
    """An executor whose answers follow from `NEEDS`: "yes" where the setting suffices, else "no"."""

    knob_space = SPACE
    question_size = vision_size = HIDDEN_SIZE
    fingerprint = "formula"
    count_names = tuple(COUNTS)
    max_new_tokens = 4
    max_prompt_tokens = 100

    def __init__(self):
        self.answered: list[tuple[str, KnobSetting]] = []

    def count_inputs(self, request, settings):
        counts = {**COUNTS, "text_tokens": LONG_TEXT_TOKENS} if request.question.startswith("digit") else COUNTS
        return {name: [count] * len(settings) for name, count in counts.items()}

    def question_features(self, questions):
        return torch.stack([_direction(question.split()[0]) for question in questions])

    def vision_features(self, requests):
        return torch.stack(
            [
                _direction(request.setting["tier"])
                + float(np.asarray(request.load_image()).mean()) / 255 * _direction("brightness")
                for request in requests
            ]
        )

    def run(self, requests, on_batch=None, progress=False):
        self.answered += [(request.sample_id, request.setting) for request in requests]
        outputs = []
        for request in requests:
            answer = "yes" if is_answered(request.question.split()[0], request.setting) else "no"
            outputs.append(ExecutorOutput(request.sample_id, request.setting, answer, COUNTS, 2))
        if on_batch is not None:
            on_batch(outputs)
        return outputs


class FormulaLatency:
    """A latency estimator whose estimates are `latency_of`, and longer for long questions that are yet to be answered."""

    def predict_latency_ms(self, settings, counts, output_tokens, quantile=None):
        ratio = 1.0 if quantile is None else UPPER_RATIOS[quantile]
        latency_ms = torch.tensor([latency_of(setting) for setting in settings])
        return ratio * latency_ms * counts["text_tokens"] / COUNTS["text_tokens"]

    def latency_ms(self, outcomes):
        return torch.tensor([latency_of(outcome.setting) for outcome in outcomes])

    def save_pretrained(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "formula.txt").write_text("5 ms + 10 tier + 5 top_k + 10 num_blocks")


def _direction(name: str) -> torch.Tensor:
    seed = int.from_bytes(name.encode()[:6], "big") % 2**31
    return torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


class ColumnRecorder:
    """A reward function that keeps the columns it is given, batch by batch, and rewards accuracy."""

    __name__ = "recorder"
    columns = ("sample_id", "latency_budget_ms", "setting", "accuracy", "latency_ms", "completions")

    def __init__(self):
        self.batches = []

    def __call__(self, **kwargs):
        self.batches.append({column: kwargs[column] for column in self.columns})
        return kwargs["accuracy"]


def make_dataset(num_rows: int, prefix: str = "train", question_types=tuple(NEEDS)) -> Dataset:
    rows = {"sample_id": [], "image": [], "question": [], "answers": [], "style": [], "metric": []}
    for row in range(num_rows):
        rows["sample_id"].append(f"{prefix}/{row:04d}")
        rows["image"].append(PILImage.new("RGB", (4, 4), (row * 37 % 256,) * 3))
        rows["question"].append(f"{question_types[row % len(question_types)]} question?")
        rows["answers"].append(["yes"])
        rows["style"].append("vqa2")
        rows["metric"].append("exact_match")
    strings = Value("string")
    features = {
        "sample_id": strings,
        "image": Image(),
        "question": strings,
        "answers": List(strings),
        "style": strings,
        "metric": strings,
    }
    return Dataset.from_dict(rows, features=Features(features))


def make_collector(path=None) -> OutcomeCollector:
    return OutcomeCollector(
        FormulaExecutor(),
        OutcomeStore(path, "formula", SPACE),
        lambda metric, answer, answers: float(answer in answers),
    )


def make_guardrail(quantile: float | None = 0.95) -> Guardrail:
    return Guardrail(FormulaLatency(), FormulaExecutor(), quantile)


def make_controller(seed: int = 0, **kwargs) -> JointControllerModel:
    torch.manual_seed(seed)
    values = {
        "knob_space": SPACE.to_dict(),
        "question_size": HIDDEN_SIZE,
        "vision_size": HIDDEN_SIZE,
        "latency_budget_min_ms": 0.3 * FULL_MS,
        "latency_budget_max_ms": FULL_MS,
        "projection_size": 32,
        "hidden_size": 64,
    }
    return JointControllerModel(JointControllerConfig(**{**values, **kwargs}))


def make_args(output_dir, **kwargs) -> JointGRPOConfig:
    values = {
        "output_dir": str(output_dir),
        "latency_budget_min_fraction": 0.35,
        "latency_budget_max_fraction": 1.0,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "num_generations": 8,
        "max_steps": 8,
        "eval_steps": 4,
        "save_steps": 4,
        "logging_steps": 4,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return JointGRPOConfig(**{**values, **kwargs})


def make_trainer(output_dir, controller=None, outcomes=None, num_rows=32, num_eval_rows=16, **kwargs):
    given = ("reward_funcs", "callbacks", "guardrail", "latency_budgets")
    trainer_kwargs = {name: kwargs.pop(name) for name in given if name in kwargs}
    latency_estimator = kwargs.pop("latency_estimator", FormulaLatency())
    return JointGRPOTrainer(
        model=make_controller() if controller is None else controller,
        outcomes=make_collector() if outcomes is None else outcomes,
        latency_estimator=latency_estimator,
        args=make_args(output_dir, **kwargs),
        train_dataset=make_dataset(num_rows),
        eval_dataset=make_dataset(num_eval_rows, "validation"),
        **trainer_kwargs,
    )


def reward_of(question_type: str, setting: KnobSetting, budget_ms: float) -> float:
    accuracy = float(is_answered(question_type, setting))
    columns = {
        "accuracy": [accuracy],
        "latency_ms": [latency_of(setting)],
        "latency_budget_ms": [budget_ms],
        "normalized_knobs": [SPACE.normalized(setting)],
    }
    return total_reward(DEFAULT_REWARDS, columns).item()


def best_reward(question_type: str, budget_ms: float, settings=SPACE) -> float:
    """The reward of the best setting, by brute force."""
    return max(reward_of(question_type, setting, budget_ms) for setting in settings)

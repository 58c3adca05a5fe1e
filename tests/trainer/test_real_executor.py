"""The trainer with a real (tiny, random) Molmo and a real latency estimator: the rooms fit together."""

import pytest
import torch
from formula_world import make_args, make_controller, make_dataset
from molmo_knobs import molmo_space

from joint_controller import JointControllerModel, JointGRPOTrainer, LatencyEstimatorModel
from joint_controller.latency import Guardrail, LatencyEstimatorConfig
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.outcomes import OutcomeCollector, OutcomeStore


SPACE = molmo_space({"low": (1, 1), "high": (9, 9)}, top_k=(1, 4), num_blocks=(2, 4))


@pytest.fixture(scope="module")
def executor(tiny_molmo, tiny_processor) -> MolmoExecutor:
    return MolmoExecutor(tiny_molmo, tiny_processor, knob_space=SPACE, max_new_tokens=2)


@pytest.fixture(scope="module")
def latency_estimator() -> LatencyEstimatorModel:
    fitted_knobs = {"tier": ["low", "high"], "top_k": [1, 4], "num_blocks": [2, 4]}
    config = LatencyEstimatorConfig(
        executor_type="molmo", fitted_knobs=fitted_knobs, upper_quantiles={"request": {"0.95": 1.2}}
    )
    estimator = LatencyEstimatorModel(config)
    for coefficients in estimator.parameters():
        coefficients.data.fill_(0.001)
    return estimator


@pytest.mark.parametrize("loss", ["grpo", "expected", "regression"])
@pytest.mark.parametrize("has_guardrail", [False, True])
def test_trains_resumes_and_never_runs_the_executor_twice(tmp_path, executor, latency_estimator, loss, has_guardrail):
    def make_trainer(folder) -> JointGRPOTrainer:
        controller = make_controller(
            knob_space=SPACE.to_dict(),
            question_size=executor.question_size,
            vision_size=executor.vision_size,
            latency_budget_min_ms=0.1,
            latency_budget_max_ms=1000.0,
            sees_slack=has_guardrail,
        )
        store = OutcomeStore(folder / "outcomes", executor.fingerprint, SPACE)
        score = lambda metric, answer, answers: float(len(answer) % 2)  # noqa: E731
        args = make_args(folder, latency_budget_min_fraction=0.8, max_steps=8, loss=loss)
        return JointGRPOTrainer(
            model=controller,
            outcomes=OutcomeCollector(executor, store, score),
            latency_estimator=latency_estimator,
            args=args,
            train_dataset=make_dataset(8),
            eval_dataset=make_dataset(4, "validation"),
            guardrail=Guardrail(latency_estimator, executor) if has_guardrail else None,
        )

    whole = make_trainer(tmp_path / "whole")
    whole.train()
    assert any(
        not torch.equal(value, other)
        for value, other in zip(
            whole.model.parameters(), make_trainer(tmp_path / "untrained").model.parameters(), strict=True
        )
    )
    assert whole.outcomes.num_executed == len(whole.outcomes.store)

    (tmp_path / "whole" / "checkpoint-8").rename(tmp_path / "whole" / "ended")
    resumed = make_trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.outcomes.num_executed == 0
    ended = JointControllerModel.from_pretrained(tmp_path / "whole" / "ended")
    again = JointControllerModel.from_pretrained(tmp_path / "whole" / "checkpoint-8")
    for value, other in zip(ended.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other)

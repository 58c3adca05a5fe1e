"""What the executor that ships with the package is worth, and that its card says so."""

import json
from statistics import fmean

import pytest

from joint_controller.executor import ExecutorRequest, embedded_executor_path
from joint_controller.knobs import KnobSetting
from joint_controller.molmo.blocks.importance_files import load_importance
from joint_controller.molmo.embedded.card import build_executor_card
from joint_controller.molmo.embedded.data import scene
from joint_controller.molmo.embedded.packed_accuracy import Run, measure_accuracy
from joint_controller.molmo.embedded.train_executor import make_parser
from joint_controller.molmo.executor import MolmoExecutor


@pytest.fixture(scope="module")
def results():
    return json.loads((embedded_executor_path() / "results.json").read_text())


@pytest.fixture(scope="module")
def executor():
    return MolmoExecutor.from_pretrained("embedded")


def accuracy_by_type(results, dataset, tier="high", top_k=8, num_blocks=8):
    [row] = [
        row
        for row in results["settings"]
        if (row["dataset"], row["tier"], row["top_k"], row["num_blocks"]) == (dataset, tier, top_k, num_blocks)
    ]
    return row["accuracy_by_type"]


def test_full_setting_answers_well_and_far_above_the_baseline(results):
    assert fmean(accuracy_by_type(results, "easy_vqa").values()) >= 0.95
    scenes = accuracy_by_type(results, "scenes")
    assert fmean(scenes.values()) >= 0.80
    for question_type, accuracy in scenes.items():
        assert accuracy >= results["questions"]["scenes"][question_type]["baseline"] + 0.20, question_type


def test_every_knob_costs_accuracy_and_costs_question_types_differently(results):
    full = accuracy_by_type(results, "scenes")
    losses = {
        knob: {name: full[name] - accuracy for name, accuracy in accuracy_by_type(results, "scenes", **lowest).items()}
        for knob, lowest in {"tier": {"tier": "low"}, "num_blocks": {"num_blocks": 4}, "top_k": {"top_k": 1}}.items()
    }
    assert fmean(losses["tier"].values()) >= 0.10
    assert fmean(losses["num_blocks"].values()) >= 0.10
    assert fmean(losses["top_k"].values()) >= 0.03
    assert min(losses["tier"].values()) < 0.02
    assert max(losses["tier"].values()) > 0.20
    preferences = [losses["tier"][name] - losses["num_blocks"][name] for name in full]
    assert min(preferences) < -0.05  # rather loses resolution
    assert max(preferences) > 0.05  # rather loses blocks


def test_results_cover_the_knob_space_and_come_from_the_recipe(results, executor, monkeypatch, request):
    settings = [KnobSetting({name: row[name] for name in executor.knob_space.names}) for row in results["settings"]]
    assert settings == 3 * list(executor.knob_space)
    monkeypatch.chdir(request.config.rootpath)
    [recipe] = make_parser().parse_args_and_config(["--config", "recipes/embedded_executor/train.yaml"])
    assert vars(recipe) == results["arguments"]


def test_card_is_written_from_the_results(results):
    folder = embedded_executor_path()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    card = build_executor_card(results, log, load_importance(folder / "importance.json"))
    assert (folder / "README.md").read_text() == card


def test_weights_are_small_enough_to_ship():
    assert (embedded_executor_path() / "model.safetensors").stat().st_size <= 16_000_000


@pytest.mark.parametrize(
    "setting", [KnobSetting(tier="high", top_k=8, num_blocks=8), KnobSetting(tier="low", top_k=1, num_blocks=4)]
)
def test_packed_accuracy_is_that_of_the_executors_answers(executor, setting):
    images = [scene("test", index) for index in range(4)]
    requests, answers = [], []
    for index, asked in enumerate(images):
        for question, answer, _ in asked.questions:
            requests.append(ExecutorRequest(f"{index}/{question}", asked.image, question, "vqa2", setting))
            answers.append(answer)
    right = [output.answer == answer for output, answer in zip(executor.run(requests), answers, strict=True)]

    run = Run(setting["tier"], setting["top_k"], tuple(executor.active_blocks(setting["num_blocks"])))
    by_type = measure_accuracy(executor.model, executor.processor, images, [run], batch_size=3)[run]
    types = [question_type for asked in images for _, _, question_type in asked.questions]
    assert by_type == {
        name: fmean(ok for ok, of in zip(right, types, strict=True) if of == name) for name in set(types)
    }

"""A family of executors with other knobs, counts and stages, from its profile to the guardrail."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_family import FormulaClock

from joint_controller.executor import (
    DECODE,
    ExecutorOutput,
    ExecutorRequest,
    StageCost,
    StageTerms,
    register_executor_family,
)
from joint_controller.knobs import Knob, KnobSetting, KnobSpace
from joint_controller.latency import (
    Guardrail,
    LatencyEstimatorModel,
    fit_latency_estimator,
    load_profile,
    read_latency_estimator,
    save_profile,
)
from joint_controller.latency.fit_report import format_model_card, plot_fit
from joint_controller.latency.fitting import cross_validate
from joint_controller.latency.profile_inputs import make_profile_inputs
from joint_controller.latency.profile_report import write_profile_report
from joint_controller.latency.profile_table import profile_settings
from joint_controller.latency.profiling import profile_executor
from joint_controller.latency.recalibration import recalibrate


SPACE = KnobSpace(
    [
        Knob("width", (0.5, 1.0, 2.0), stage=2),
        Knob("voice", ("quiet", "loud"), stage=1, meanings=(2, 7)),
        Knob("skipped", (0, 1), stage=2),
    ]
)


class OrchestraCostModel:
    count_names = ("players", "score_tokens")
    knob_names = ("width", "skipped")
    stages = {
        "tuning": StageCost(("constant", "players"), ("players",)),
        "waiting": StageCost(("constant",), ("players",), scope="request"),
        "listening": StageCost(("tokens x width",), ("tokens", "width")),
        "playing": StageCost(("players x width", "skipped"), ("players", "skipped")),
        DECODE: StageCost(("constant", "width"), ("width", "context")),
    }

    def __init__(self, shape, prefill_lengths):
        self.seats = 1 if shape is None else shape["seats"]

    def terms(self, stage, columns):
        players, tokens, width = columns["players"], columns["score_tokens"], columns["width"]
        if stage == "tuning":
            return StageTerms((torch.ones_like(players), players), (players,))
        if stage == "waiting":
            return StageTerms((torch.ones_like(players),), (players,))
        if stage == "listening":
            return StageTerms((self.seats * tokens * width,), (tokens, width))
        if stage == "playing":
            return StageTerms((players * width, columns["skipped"]), (players, columns["skipped"]))
        return StageTerms((torch.ones_like(width), width), (width, tokens + columns["output_tokens"]))

    def request_flops(self, setting, counts, output_tokens):
        return None


class Orchestra:
    """An executor whose true times are a formula."""

    model_type = "orchestra"
    knob_space = SPACE
    count_names = OrchestraCostModel.count_names
    max_prompt_tokens = 512
    fingerprint = "orchestra-1"
    max_new_tokens = 4
    shape = {"seats": 3, "halls": ["big", "small"]}
    stage_names = ("tuning", "waiting", "listening", "playing")
    question_size = vision_size = 2
    device = torch.device("cpu")
    dtype = "float32"
    mode = "plain"
    prefill_lengths = None
    slower = 1.0

    def count_inputs(self, request, settings):
        tokens = len(request.question.split())
        return {
            "players": [
                SPACE["voice"].meaning(setting["voice"]) + request.load_image().width // 400 for setting in settings
            ],
            "score_tokens": [tokens] * len(settings),
        }

    def warm_up(self, progress=False):
        self.is_warm = True

    def open(self, request, clock):
        assert self.is_warm
        return OrchestraRequest(self, request, clock)

    def true_ms(self, request, setting):
        """Of each stage, the last of a decode step; overhead and controller are what `FormulaClock` says."""
        counts = {name: values[0] for name, values in self.count_inputs(request, [setting]).items()}
        players, tokens, width = counts["players"], counts["score_tokens"], setting["width"]
        stage_ms = {
            "tuning": 1.0 + 0.5 * players,
            "waiting": 5.0,
            "listening": 0.3 * tokens * width,
            "playing": 0.7 * players * width + 2.0 * setting["skipped"],
            DECODE: 0.2 + 0.4 * width,
        }
        return counts, {stage: self.slower * ms for stage, ms in stage_ms.items()}

    def total_ms(self, request, setting, output_tokens):
        stage_ms = self.true_ms(request, setting)[1]
        return 0.1 + 0.2 + sum(stage_ms.values()) + (output_tokens - 2) * stage_ms[DECODE]


class OrchestraRequest:
    def __init__(self, executor, request, clock):
        self.executor, self.request, self.clock = executor, request, clock
        self.count_inputs = executor.count_inputs

    def question_features(self, questions):
        return torch.ones(len(questions), 2)

    def vision_features(self, requests):
        return torch.ones(len(requests), 2)

    def answer(self, setting, decode_steps=None):
        counts, stage_ms = self.executor.true_ms(self.request, setting)
        decode_ms = stage_ms.pop(DECODE)
        for stage, ms in stage_ms.items():
            self.clock.take(stage, ms)
        for _ in range(decode_steps):
            self.clock.take(DECODE, decode_ms)
        return ExecutorOutput(self.request.sample_id, setting, "music", counts, 1 + decode_steps)


class OrchestraFamily:
    model_type = "orchestra"
    random_names = ()
    code_folders = (Path(__file__).parent,)

    def cost_model(self, shape, prefill_lengths, knob_names):
        return OrchestraCostModel(shape, prefill_lengths)


FAMILY = OrchestraFamily()


@pytest.fixture(scope="module")
def executor():
    register_executor_family(FAMILY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("joint_controller.request_path.StageClock", FormulaClock)
        yield Orchestra()


@pytest.fixture(scope="module")
def profile(executor, tmp_path_factory):
    profile = profile_executor(executor, make_profile_inputs(10), repeats=2, decode_steps=3, progress=False)
    return load_profile(save_profile(profile, tmp_path_factory.mktemp("profile")))


@pytest.fixture(scope="module")
def estimator(profile, tmp_path_factory):
    model, report = fit_latency_estimator(profile, num_folds=2, num_units=4)
    assert report["total"]["mape"] < 0.05
    folder = tmp_path_factory.mktemp("estimator")
    model.save_pretrained(folder)
    return read_latency_estimator(folder)


def test_its_profile_has_its_columns(executor, profile, tmp_path):
    assert len(profile) == 10 * len(SPACE) and set(profile_settings(profile)) == set(SPACE)
    row = profile[0]
    assert {"width", "voice", "skipped", "players", "score_tokens", "waiting_ms", "playing_ms_spread"} <= set(row)
    assert row["waiting_ms"] == 5.0 and row["controller_ms"] == 0.2 and len(row["decode_ms"]) == 3
    model_ms = row["tuning_ms"] + row["listening_ms"] + row["playing_ms"] + 3 * row["decode_ms_per_token"]
    assert row["model_ms"] == pytest.approx([model_ms] * 2) and row["latency_scope"] == "request"
    assert row["request_ms"] == pytest.approx([5.3 + model_ms] * 2)
    assert row["executor_type"] == "orchestra" and not any(profile["repeats_disagree"])
    report = write_profile_report(profile, tmp_path)
    assert list(report["settings"]) == [str(SPACE.cheapest), str(SPACE.full)]
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"stage_shares.png", "prefill.png", "decode.png", "knobs.png"}


def test_its_estimator_predicts_the_truth(executor, profile, estimator):
    assert isinstance(estimator, LatencyEstimatorModel)
    estimator.check_executor(executor)
    assert list(estimator.costs.stages) == ["overhead", "controller", *OrchestraCostModel.stages]
    assert estimator.config.fitted_knobs == {"width": [0.5, 1.0, 2.0], "voice": ["quiet", "loud"], "skipped": [0, 1]}
    settings = [KnobSetting(width=1.5, voice="loud", skipped=1), SPACE.cheapest]
    estimate_ms = estimator.predict_latency_ms(settings, {"players": [8, 3], "score_tokens": [20, 40]}, [5, 1])
    expected = [
        5.3 + 1 + 0.5 * 8 + 0.3 * 20 * 1.5 + 0.7 * 8 * 1.5 + 2 + 4 * (0.2 + 0.4 * 1.5),
        5.3 + 1 + 1.5 + 0.3 * 40 * 0.5 + 1.05,
    ]
    of_model = estimator.in_scope("model").predict_latency_ms(
        settings, {"players": [8, 3], "score_tokens": [20, 40]}, [5, 1]
    )
    assert of_model.tolist() == pytest.approx([ms - 5.3 for ms in expected], rel=0.05)
    assert estimate_ms.tolist() == pytest.approx(expected, rel=0.05)
    with pytest.raises(ValueError, match="knob `width` is 3.0 but the latency estimator was fitted on 0.5 to 2.0"):
        estimator.predict_latency_ms([KnobSetting(width=3.0, skipped=0)], {"players": [2], "score_tokens": [20]}, [1])


def test_its_report_is_by_its_knobs(profile, estimator, tmp_path):
    plot_fit(cross_validate(profile, num_folds=2, num_units=2), tmp_path)
    by_knob = estimator.config.held_out["by_knob"]
    assert {knob: list(values) for knob, values in by_knob.items()} == {
        "width": ["0.5", "1.0", "2.0"],
        "voice": ["loud", "quiet"],  # JSON is written in alphabetical order
        "skipped": ["0", "1"],
    }
    card = format_model_card(estimator)
    assert "| listening | tokens x width |" in card and "prefill, voice=quiet" in card
    estimator.save_pretrained(tmp_path)
    code = card.split("```python")[1].split("```")[0]
    exec(code.replace("path/to/this/folder", str(tmp_path)), {})


def test_its_estimator_is_adapted_to_a_slower_machine(executor, estimator):
    slower = Orchestra()
    slower.slower = 3.0
    profile = profile_executor(slower, make_profile_inputs(3), repeats=1, decode_steps=2, progress=False)
    adapted = recalibrate(estimator, profile)
    counts = {"players": [8, 3], "score_tokens": [20, 40]}
    settings, output_tokens = [SPACE.full, SPACE.cheapest], [5, 1]
    ratio = adapted.predict_latency_ms(settings, counts, output_tokens) / estimator.predict_latency_ms(
        settings, counts, output_tokens
    )
    assert ratio.tolist() == pytest.approx([3, 3], rel=0.05)


def test_stages_that_nothing_predicts_are_refused(executor):
    longer = Orchestra()
    longer.stage_names = (*Orchestra.stage_names, "bowing")
    with pytest.raises(ValueError, match="stages are tuning, .*, bowing, but its cost model has tuning, .*, decode"):
        profile_executor(longer, make_profile_inputs(1), progress=False)


def test_its_guardrail_promises_what_is_kept(executor, estimator):
    requests = [
        ExecutorRequest(f"made/{number}", Image.new("RGB", (width, 30)), "word " * length, "vqa2", SPACE.full)
        for number, (width, length) in enumerate([(100, 5), (900, 60)])
    ]
    latency_ms = Guardrail(estimator, executor, 0.95).predict_latency_ms(requests)
    assert latency_ms.shape == (2, len(SPACE))

    # An opened request knows its tokens already.
    class Opened:
        def count_inputs(self, request, settings):
            return {"players": [3] * len(settings), "score_tokens": [600, *[512] * (len(settings) - 1)]}

    guardrail = Guardrail(estimator, executor, 0.95)
    [opened_ms] = guardrail.predict_latency_ms(requests[:1], Opened())
    # Of which the first is longer than the executor takes.
    assert opened_ms.isinf().tolist() == [True] + [False] * (len(SPACE) - 1)
    fit = guardrail.fit(guardrail.typical_ms(requests[:1], Opened()), 1e9)[1]
    assert fit.fits_budget.item() and fit.fits.sum() == len(SPACE) - 1 and not fit.fits[0, 0]
    for row, request in enumerate(requests):
        true_ms = [executor.total_ms(request, setting, executor.max_new_tokens) for setting in SPACE]
        typical_ms = latency_ms[row] / estimator.quantile_factor(0.95)
        assert typical_ms.tolist() == pytest.approx(true_ms, rel=0.05)
    fit = guardrail.fit(guardrail.typical_ms(requests), latency_ms[1, 0].item() / 2)[1]
    assert fit.fits_budget.tolist() == [True, False] and fit.fits[1].nonzero().flatten().tolist() == [0]

import io
import math
import shutil
import threading
import time
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from molmo_knobs import molmo_setting
from PIL import Image
from safetensors.torch import load_file, save_file

import joint_controller.controller.loading
from joint_controller import (
    JointControllerConfig,
    JointControllerModel,
    JointPipeline,
    LatencyEstimatorModel,
)
from joint_controller import pipeline as pipeline_module
from joint_controller.data import load_vqa_dataset
from joint_controller.executor import ExecutorRequest
from joint_controller.latency import LatencyEstimatorConfig, embedded_latency_estimator_path
from joint_controller.latency.clock_check import ClockChecker, LatencyCheck
from joint_controller.molmo.executor import MolmoExecutor


QUESTION = "what color is the shape?"
STAGES = ("overhead", "controller", "image_processing", "vision", "llm_prefill", "decode")
# What takes time, and is tested by itself.
QUICK = {"check_latency": False, "warm_up": False, "progress": False}


@pytest.fixture(scope="module")
def controller_path(tmp_path_factory):
    """A controller whose choice is known: medium, top_k 8, 8 blocks. Its answers have two tokens at most."""
    executor = MolmoExecutor.from_pretrained("embedded", max_new_tokens=2)
    controller = JointControllerModel(
        JointControllerConfig(
            knob_space=executor.knob_space.to_dict(),
            question_size=executor.question_size,
            vision_size=executor.vision_size,
            latency_budget_min_ms=30,
            latency_budget_max_ms=110,
            heads="independent",
            max_new_tokens=2,
        )
    )
    controller.stage1.head.linears[0].bias.data[1] = 1.0
    controller.stage2.head.linears[0].bias.data[3] = 1.0
    controller.stage2.head.linears[1].bias.data[3] = 1.0
    folder = tmp_path_factory.mktemp("controller")
    controller.save_pretrained(folder)
    LatencyEstimatorModel.from_pretrained(embedded_latency_estimator_path()).save_pretrained(
        folder / "latency_estimator"
    )
    return folder


@pytest.fixture(scope="module")
def pipeline(controller_path):
    """Without a guardrail, and without corrections: what it gives does not depend on the machine."""
    return JointPipeline.from_pretrained(controller_path, guardrail_quantile=None, adapt=False, **QUICK)


@pytest.fixture(scope="module")
def image():
    return load_vqa_dataset("easy_vqa", "test", max_samples=1)[0]["image"]


def test_answers_are_the_executors_at_the_controllers_setting(pipeline):
    setting = molmo_setting("medium", 8, 8)
    for row in load_vqa_dataset("easy_vqa", "test", max_samples=4):
        found = pipeline(row["image"], row["question"], latency_budget_ms=80)
        request = ExecutorRequest(row["sample_id"], row["image"], row["question"], "vqa2", setting)
        [output] = pipeline.executor.run([request])
        assert (found.answer, found.setting, found.latency_budget_ms) == (output.answer, setting, 80)
        assert found.answer == row["answers"][0]  # the executor answers easy-vqa rightly
        assert found.fits_budget is None and found.latency_upper_ms is None
        [expected] = pipeline.latency_estimator.predict_latency_ms(
            [setting], {name: [count] for name, count in output.counts.items()}, [output.output_tokens]
        ).tolist()
        # The rest is what checking the request has taken.
        assert expected <= found.latency_ms < expected + 20


def test_what_was_measured_is_what_a_users_watch_says(pipeline, image):
    unaccounted = []
    for _ in range(20):
        started = time.perf_counter()
        found = pipeline(image, QUESTION, latency_budget_ms=80)
        unaccounted.append(1000 * (time.perf_counter() - started) - found.measured_latency_ms)
    assert tuple(found.measured_ms) == STAGES and found.latency_scope == "request"
    assert found.measured_latency_ms == pytest.approx(sum(found.measured_ms.values()))
    assert all(ms > 0 for ms in list(found.measured_ms.values())[:-1])
    assert 0 < min(unaccounted) < 0.3  # of some forty milliseconds


def test_in_the_models_scope_its_stages_alone_are_counted(controller_path, image):
    pipeline = JointPipeline.from_pretrained(controller_path, latency_scope="model", adapt=False, **QUICK)
    found = pipeline(image, QUESTION, latency_budget_ms=200)
    assert found.latency_scope == "model" and tuple(found.measured_ms) == STAGES
    of_model = sum(found.measured_ms[stage] for stage in ("vision", "llm_prefill", "decode"))
    assert found.measured_latency_ms == pytest.approx(of_model)
    counts = pipeline.executor.run([ExecutorRequest("one", image, QUESTION, "vqa2", found.setting)])[0].counts
    expected = pipeline.latency_estimator.predict_latency_ms(
        [found.setting], {name: [count] for name, count in counts.items()}, [2], quantile=0.95
    )
    assert found.latency_upper_ms == pytest.approx(expected.item(), rel=1e-5)


def damaged_image():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:2000]))


def closed_image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        return image


@pytest.mark.parametrize(
    "budget",
    [0, -1, math.nan, math.inf, 10**400, "15", [15], None, True, np.bool_(True), np.array([1.0, 2.0]), torch.zeros(0)],
    ids=repr,
)
def test_a_budget_is_one_finite_number_above_0(pipeline, image, budget):
    with pytest.raises(ValueError, match="^`latency_budget_ms` is .*: give a finite number of milliseconds above 0.$"):
        pipeline(image, QUESTION, latency_budget_ms=budget)


@pytest.mark.parametrize("budget", [80, np.float32(80), np.int64(80), torch.tensor(80.0), np.array([80.0])], ids=repr)
def test_a_number_of_any_library_is_a_budget(pipeline, image, budget):
    found = pipeline(image, QUESTION, latency_budget_ms=budget)
    assert found.latency_budget_ms == 80.0 and type(found.latency_budget_ms) is float


@pytest.mark.parametrize(
    "question, message",
    [
        (" ", "`question` is empty"),
        (None, "`question` is a NoneType"),
        (b"what?", "`question` is a bytes"),
        ("what \ud800 ?", "`question` is not Unicode"),
        ("what is it ? " * 500, r"the prompt of the question has \d+ tokens, .* but the executor has room for \d+"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(pipeline, image, question, message):
    with pytest.raises(ValueError, match=message) as raised:
        pipeline(image, question, latency_budget_ms=50)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "make_image, message",
    [
        (lambda folder: "image.png", "`image` is a str: give a PIL image"),
        (lambda folder: None, "`image` is a NoneType"),
        (lambda folder: damaged_image(), r"`image` cannot be used: it cannot be read \(image file is truncated"),
        (closed_image, r"`image` cannot be used: it cannot be read \(Operation on closed image\)"),
        (lambda folder: Image.new("RGB", (0, 5)), "`image` is empty, it has 0x5 pixels"),
        (lambda folder: Image.new("F", (5, 5)), "`image` cannot be used: .*mode F"),
        (lambda folder: Image.new("LAB", (5, 5)), "`image` cannot be used: .*mode LAB"),
        (lambda folder: Image.new("I", (5, 5), 70000), "`image` cannot be used: .*more than 16 bits"),
    ],
    ids=["path", "none", "damaged", "closed", "empty", "floating point", "Lab", "too many bits"],
)
def test_images_that_cannot_be_used_are_refused(pipeline, tmp_path, make_image, message):
    with pytest.raises(ValueError, match=message) as raised:
        pipeline(make_image(tmp_path), QUESTION, latency_budget_ms=50)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_images_of_other_modes_are_taken(pipeline, mode):
    assert pipeline(Image.new(mode, (40, 30)), QUESTION, latency_budget_ms=50).answer


def test_what_else_cannot_be_answered_is_refused(pipeline, image, tmp_path):
    for style in ("vqa3", None, ["vqa2"]):
        with pytest.raises(ValueError, match="`style` is"):
            pipeline(image, QUESTION, latency_budget_ms=50, style=style)
    with pytest.raises(FileNotFoundError, match="is not the folder of a controller"):
        JointPipeline.from_pretrained(tmp_path / "missing")


@pytest.mark.parametrize("question", ["what is <im_patch> ?", "<|endoftext|> <im_start><im_col> is it red ? <pad>"])
def test_special_tokens_in_a_question_are_text(pipeline, image, question):
    found = pipeline(image, question, latency_budget_ms=80)
    executor, plain = pipeline.executor, ExecutorRequest("plain", image, QUESTION, "vqa2", found.setting)
    odd = replace(plain, sample_id=question, question=question)
    counts = [executor.count_inputs(request, [found.setting]) for request in (plain, odd)]
    assert counts[0]["vision_tokens"] == counts[1]["vision_tokens"]
    assert found.answer == executor.run([odd])[0].answer
    [encoded] = executor.encode([odd], "medium")
    layout = [executor.processor.tokenizer.convert_tokens_to_ids(name) for name in ("<im_patch>", "<im_start>")]
    ids = encoded.input_ids.tolist()
    [encoded] = executor.encode([plain], "medium")
    assert [ids.count(one) for one in layout] == [encoded.input_ids.tolist().count(one) for one in layout]


def test_settings_at_which_the_prompt_is_too_long_are_left_out(controller_path, image):
    """Also without a guardrail."""
    pipeline = JointPipeline.from_pretrained(controller_path, guardrail_quantile=None, **QUICK)
    executor, large = pipeline.executor, Image.new("RGB", (300, 300), "red")
    cheap, wanted = executor.knob_space.cheapest, molmo_setting("medium", 8, 8)

    def prompt_tokens(question, setting):
        counts = executor.count_inputs(ExecutorRequest("one", large, question, "vqa2", setting), [setting])
        return counts["vision_tokens"][0] + counts["text_tokens"][0]

    words = executor.max_prompt_tokens - prompt_tokens("red", cheap)
    question = "red " * (words + 1)
    assert prompt_tokens(question, cheap) == executor.max_prompt_tokens < prompt_tokens(question, wanted)
    assert pipeline(large, "red " * 5, 80).setting == wanted
    assert pipeline(large, question, 80).setting["tier"] == "low"
    with pytest.raises(ValueError, match="ask in fewer words"):
        pipeline(large, question + "red", 80)


def test_guardrail_takes_the_likeliest_setting_that_is_predicted_to_fit(controller_path):
    """Against the latency of every setting, predicted one by one from what the executor encodes."""
    pipeline = JointPipeline.from_pretrained(controller_path, latency_scope="model", adapt=False, **QUICK)
    executor = pipeline.executor
    row = load_vqa_dataset("easy_vqa", "test", max_samples=1)[0]

    def predicted_ms(setting):
        request = ExecutorRequest("brute-force", row["image"], row["question"], "vqa2", setting)
        [encoded] = executor.encode([request], setting["tier"])
        counts = {name: [count] for name, count in encoded.counts.items()}
        return pipeline.latency_estimator.predict_latency_ms([setting], counts, [2], quantile=0.95).item()

    latencies = {setting: predicted_ms(setting) for setting in executor.knob_space}
    wanted = molmo_setting("medium", 8, 8)
    cheapest, full = latencies[executor.knob_space.cheapest], latencies[executor.knob_space.full]
    chosen = set()
    for budget in (
        full,
        latencies[wanted],
        0.97 * latencies[wanted],
        0.7 * latencies[wanted],
        1.2 * cheapest,
        cheapest,
    ):
        budget *= 1 + 1e-6  # single predictions may round differently
        fits = [setting for setting, latency_ms in latencies.items() if latency_ms <= budget]
        # Stage 1: medium if anything of it fits. Stage 2: of 8 experts and 8 blocks, as many as fit; the heads' other
        # logits are alike, so that of two settings that keep one of the two, the first is taken.
        tier = "medium" if any(setting["tier"] == "medium" for setting in fits) else "low"
        likeliest = max(
            (setting for setting in fits if setting["tier"] == tier),
            key=lambda setting: (setting["top_k"] == 8) + (setting["num_blocks"] == 8),
        )
        found = pipeline(row["image"], row["question"], latency_budget_ms=budget)
        assert found.fits_budget is True and found.setting == likeliest and found.latency_ms <= budget
        assert found.latency_upper_ms == pytest.approx(latencies[likeliest], rel=1e-5)
        chosen.add(found.setting)
    assert len(chosen) > 3 and wanted in chosen
    assert {setting["tier"] for setting in chosen} == {"low", "medium"}
    # Nothing fits: the cheapest setting, and the answer says so.
    found = pipeline(row["image"], row["question"], latency_budget_ms=0.99 * cheapest)
    assert found.fits_budget is False and found.setting == executor.knob_space.cheapest
    controller = JointControllerModel.from_pretrained(controller_path)
    without = JointPipeline(controller, executor, pipeline.latency_estimator, guardrail_quantile=None)
    found = without(row["image"], row["question"], latency_budget_ms=cheapest)
    assert found.fits_budget is None and found.setting == wanted


def test_what_reading_the_image_takes_is_not_left_of_the_budget(controller_path, image):
    class Slow(Image.Image):
        def load(self):
            time.sleep(0.15)
            return super().load()

    pipeline = JointPipeline.from_pretrained(controller_path, adapt=False, **QUICK)
    slow = Slow()
    slow.__dict__.update(image.__dict__)
    quick = pipeline(image, QUESTION, latency_budget_ms=400)
    budget = quick.latency_upper_ms + 100
    assert pipeline(image, QUESTION, budget).setting == quick.setting
    found = pipeline(slow, QUESTION, budget)
    assert found.setting != quick.setting and found.measured_ms["overhead"] >= 150
    assert found.latency_upper_ms >= 150 and found.latency_ms >= 150
    assert pipeline(slow, QUESTION, 150).fits_budget is False


def test_a_guardrail_that_cannot_promise_is_refused(controller_path):
    with pytest.raises(ValueError, match="has no quantile 0.6"):
        JointPipeline.from_pretrained(controller_path, guardrail_quantile=0.6, **QUICK)


# --- the way of running -----------------------------------------------------------------------------------------------


def with_way(controller_path, folder, **way):
    """A copy of the controller whose latencies are of another way of running."""
    shutil.copytree(controller_path, folder)
    estimator = LatencyEstimatorModel.from_pretrained(folder / "latency_estimator")
    for name, value in way.items():
        setattr(estimator.config, name, value)
    estimator.save_pretrained(folder / "latency_estimator")
    return folder


def test_the_executor_runs_as_its_estimator_was_measured(controller_path, tmp_path):
    executor = JointPipeline.from_pretrained(controller_path, **QUICK).executor
    assert (executor.device.type, executor.dtype, executor.mode) == ("cpu", "float32", "onednn")
    assert executor.max_new_tokens == 2  # the controller's
    plain = with_way(controller_path, tmp_path / "plain", executor_mode="plain", executor_dtype="bfloat16")
    executor = JointPipeline.from_pretrained(plain, max_new_tokens=5, **QUICK).executor
    assert (executor.dtype, executor.mode, executor.max_new_tokens) == ("bfloat16", "plain", 5)
    # What agrees may be asked for.
    same = {"mode": "plain", "dtype": torch.bfloat16, "device": "cpu", "num_threads": 1}
    assert JointPipeline.from_pretrained(plain, **same, **QUICK).executor.mode == "plain"


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"mode": "plain"}, "`mode` is plain, but the latency estimator is of onednn: leave `mode` out, or"),
        ({"dtype": "bfloat16"}, "`dtype` is bfloat16, but .* of float32"),
        ({"dtype": torch.float64}, "`dtype` is float64, but .* of float32"),
        ({"device": "cuda"}, "`device` is cuda, but .* of cpu: .*joint-controller profile"),
        ({"device": "gpu"}, "`device` is 'gpu': give one that torch knows"),
        ({"num_threads": 2}, "`num_threads` is 2, but .* of 1"),
    ],
)
def test_another_way_of_running_is_refused(controller_path, asked, message):
    with pytest.raises(ValueError, match=message) as raised:
        JointPipeline.from_pretrained(controller_path, **asked, **QUICK)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_estimator_of_a_gpu_needs_one(controller_path, tmp_path):
    folder = with_way(
        controller_path, tmp_path / "gpu", device_type="cuda", device_name="NVIDIA H100", num_threads=None
    )
    with pytest.raises(
        ValueError, match=r"is of a GPU \(NVIDIA H100\), and there is none here: .*joint-controller profile"
    ):
        JointPipeline.from_pretrained(folder, **QUICK)


def test_parts_that_run_otherwise_do_not_make_a_pipeline(controller_path):
    executor = MolmoExecutor.from_pretrained("embedded", mode="plain")
    parts = (JointControllerModel.from_pretrained(controller_path), executor)
    estimator = LatencyEstimatorModel.from_pretrained(controller_path / "latency_estimator")
    with pytest.raises(ValueError, match="another way of running the executor .mode onednn there, plain here"):
        JointPipeline(*parts, estimator)


def test_torchs_threads_are_the_estimators_during_a_call_alone(pipeline, image, monkeypatch):
    seen = []
    open_request = pipeline.executor.open

    def watched(*args):
        seen.append(torch.get_num_threads())
        return open_request(*args)

    monkeypatch.setattr(pipeline.executor, "open", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pipeline(image, QUESTION, latency_budget_ms=80)
        assert (seen, torch.get_num_threads()) == ([1], 3)
        with pytest.raises(ValueError, match="`style`"):
            pipeline(image, QUESTION, latency_budget_ms=80, style="none")
        assert (seen, torch.get_num_threads()) == ([1, 1], 3)
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads_take_turns(pipeline, monkeypatch):
    rows = list(load_vqa_dataset("easy_vqa", "test", max_samples=8))
    inside, most, answers = [], [], {}
    answer = pipeline._path.answer

    def watched(request, *args, **kwargs):
        inside.append(request.sample_id)
        most.append(len(inside))
        try:
            return answer(request, *args, **kwargs)
        finally:
            inside.remove(request.sample_id)

    def ask(number):
        answers[number] = pipeline(rows[number]["image"], rows[number]["question"], 80).answer

    monkeypatch.setattr(pipeline._path, "answer", watched)
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == len(rows)
    assert [answers[number] for number in range(len(rows))] == [row["answers"][0] for row in rows]


# --- warming up, checking and drift -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_warm_up_says_how_long_it_took_and_is_no_request(controller_path, capsys):
    options = {**QUICK, "warm_up": True}
    assert JointPipeline.from_pretrained(controller_path, **options).drift.num_requests == 0
    assert capsys.readouterr().out == ""
    JointPipeline.from_pretrained(controller_path, **{**options, "progress": True})
    out = capsys.readouterr().out
    assert out.startswith("Warmed up in ") and out.count("\n") == 1


def fake_check(finding="", **fields):
    numbers = {"measured_ms": {"total": 2.0}, "predicted_ms": {"total": 1.0}, "ratios": {"total": 2.0}}
    return LatencyCheck(
        num_requests=96,
        num_disturbed=0,
        seconds=1.0,
        latency_scope="request",
        p95_ratio=2.1,
        predicted_p95_ratio=1.1,
        coverage=0.0,
        swing=1.0,
        finding=finding,
        **numbers,
        **fields,
    )


@pytest.mark.slow
def test_latencies_are_checked_once_a_machine(controller_path, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JOINT_CONTROLLER_CACHE", str(tmp_path))
    base = LatencyEstimatorModel.from_pretrained(controller_path / "latency_estimator")
    adapted = LatencyEstimatorModel(base.config)
    adapted.load_state_dict({name: 2 * values for name, values in base.state_dict().items()})
    asked = []

    def check(self, path, current, *args):
        asked.append((current, *args))
        check = fake_check("latencies are off", is_adapted=True, error=0.5, adapted_error=0.01)
        return adapted, self._keep(adapted, check)

    monkeypatch.setattr(ClockChecker, "check", check)
    first = JointPipeline.from_pretrained(controller_path, progress=True)
    assert first.latency_estimator is adapted and len(asked) == 1
    assert "the estimator was adapted, its mean error is 50.0% without and 1.0% with that" in capsys.readouterr().out
    again = JointPipeline.from_pretrained(controller_path, **{**QUICK, "check_latency": True})
    assert len(asked) == 1 and again.latency_estimator is not adapted
    assert torch.equal(again.latency_estimator.coefficients, adapted.coefficients)
    assert capsys.readouterr().out == ""
    # What is predicted is the adapted estimator's.
    image = Image.new("RGB", (64, 64), "red")
    off = JointPipeline.from_pretrained(controller_path, **QUICK)
    assert off.latency_estimator.coefficients.sum() < again.latency_estimator.coefficients.sum()
    assert again(image, QUESTION, 500).latency_ms > 1.5 * off(image, QUESTION, 500).latency_ms
    # On request, once more: what is used is compared.
    assert again.check_latency(20, 3.0, "never", progress=False).is_adapted
    assert asked[1][0] is not adapted and asked[1][1:] == (20, 3.0, "never") and len(asked) == 2


def test_drift_is_what_calls_took(controller_path, image):
    pipeline = JointPipeline.from_pretrained(controller_path, **QUICK)
    found = [pipeline(image, QUESTION, latency_budget_ms=10_000) for _ in range(12)]
    assert pipeline.drift.num_requests == 12 and pipeline.drift.share_over_budget == 0.0
    assert pipeline.drift.factor != 1.0 and astuple(pipeline.drift)[0] == 12
    # Later predictions follow what was measured.
    typical = sorted(answer.measured_latency_ms for answer in found)[6]
    assert pipeline(image, QUESTION, 10_000).latency_ms == pytest.approx(typical, rel=0.35)
    fixed = JointPipeline.from_pretrained(controller_path, adapt=False, **QUICK)
    for _ in range(10):
        fixed(image, QUESTION, 10_000)
    assert fixed.drift.factor == 1.0 and fixed.drift.num_requests == 10 and fixed.drift.median_ratio > 0


def test_other_estimators_are_not_checked(controller_path, monkeypatch, capsys):
    """Those that do not say what they were measured on, and cannot be adapted."""
    monkeypatch.setattr(pipeline_module, "LatencyEstimatorModel", LatencyEstimatorConfig)
    pipeline = JointPipeline.from_pretrained(controller_path, warm_up=False)
    assert capsys.readouterr().out == "A LatencyEstimatorModel is not checked against the clock.\n"
    with pytest.raises(ValueError, match="cannot be checked: give an estimator that `joint-controller fit-latency`"):
        pipeline.check_latency()


# --- what is broken ---------------------------------------------------------------------------------------------------


def broken_copy(controller_path, folder, break_weights):
    """A copy of the controller whose weights are changed by `break_weights(path)`."""
    shutil.copytree(controller_path, folder)
    break_weights(folder / "model.safetensors")
    return folder


def test_a_broken_controller_is_refused_in_one_line(controller_path, tmp_path):
    def cut(path):
        path.write_bytes(path.read_bytes()[:1000])

    def empty(path):
        path.write_bytes(b"")

    def make_nan(path):
        weights = load_file(path)
        weights["stage1.head.linears.0.bias"][0] = float("nan")
        save_file(weights, path, {"format": "pt"})

    def drop_a_value(path):
        weights = load_file(path)
        weights["stage1.head.linears.0.bias"] = weights["stage1.head.linears.0.bias"][:1].clone()
        save_file(weights, path, {"format": "pt"})

    def drop_a_weight(path):
        weights = load_file(path)
        del weights["stage1.head.linears.0.bias"]
        save_file(weights, path, {"format": "pt"})

    messages = {
        cut: "model.safetensors' cannot be read",
        empty: "model.safetensors' cannot be read",
        make_nan: r"holds weights that are not finite \('stage1.head.linears.0.bias'\)",
        drop_a_value: "does not fit|cannot be read",
        drop_a_weight: "does not fit '.*config.json' .stage1.head.linears.0.bias",
    }
    for number, (break_weights, message) in enumerate(messages.items()):
        with pytest.raises(ValueError, match=message) as raised:
            JointPipeline.from_pretrained(broken_copy(controller_path, tmp_path / str(number), break_weights), **QUICK)
        assert "\n" not in str(raised.value)


def test_a_controller_is_taken_from_the_hub_by_its_name(controller_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        joint_controller.controller.loading,
        "snapshot_download",
        lambda name, **kwargs: asked.append(name) or str(controller_path),
    )
    assert JointPipeline.from_pretrained("somebody/controller", **QUICK).latency_estimator.config.held_out
    assert asked == ["somebody/controller"]


def test_a_broken_stage_1_is_refused_in_one_line(controller_path, tmp_path):
    weights = load_file(controller_path / "model.safetensors")
    weights["stage1.head.linears.0.bias"][0] = float("nan")
    broken = broken_copy(controller_path, tmp_path / "broken", lambda path: save_file(weights, path, {"format": "pt"}))
    with pytest.raises(ValueError, match="holds weights that are not finite"):
        JointControllerModel.from_pretrained(controller_path).load_stage1(broken)

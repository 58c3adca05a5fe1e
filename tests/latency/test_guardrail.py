"""The guardrail against the latency of every setting, predicted one by one from what the executor encodes."""

import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from joint_controller import KnobSetting, LatencyEstimatorConfig, LatencyEstimatorModel
from joint_controller.executor import ExecutorRequest
from joint_controller.latency import Guardrail, RecordedLatencies, settings_that_fit
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.molmo.knob_space import build_knob_space


SPACE = build_knob_space({"low": (1, 2), "medium": (3, 5), "high": (6, 9)}, top_k=(1, 2, 4), num_blocks=(2, 3, 4))
QUANTILES = {"0.9": 1.1, "0.95": 1.25, "0.99": 1.5}


@pytest.fixture(scope="module")
def executor(tiny_molmo, tiny_processor):
    return MolmoExecutor(tiny_molmo, tiny_processor, knob_space=SPACE, max_new_tokens=5)


@pytest.fixture(scope="module")
def estimator(executor):
    config = LatencyEstimatorConfig(
        executor_type="molmo",
        fitted_knobs={name: list(values) for name, values in SPACE.values.items()},
        upper_quantiles={"request": QUANTILES},
        executor_shape=executor.shape,
    )
    model = LatencyEstimatorModel(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, generator=generator) / 10)
    return model


def make_requests():
    requests = []
    sizes = [(64, 64), (31, 200), (300, 40), (1, 1), (90, 61)]
    for number, size in enumerate(sizes):
        question = "what color is the star? " * (1 + number)
        requests.append(ExecutorRequest(f"made/{number}", Image.new("RGB", size), question, "vqa2", SPACE.full))
    # An image that lies on its side, as cameras write them, and one that is only read when it is needed.
    sideways = Image.new("RGB", (300, 40))
    sideways.getexif()[0x0112] = 6
    requests.append(ExecutorRequest("made/sideways", sideways, "is it red?", "vqa2", SPACE.full))
    requests.append(ExecutorRequest("made/late", lambda: Image.new("RGB", (40, 300)), "is it?", "vqa2", SPACE.full))
    return requests


@pytest.mark.parametrize("quantile", [0.9, 0.95])
def test_latencies_are_those_of_every_setting_of_the_encoded_request(executor, estimator, quantile):
    requests = make_requests()
    found = Guardrail(estimator, executor, quantile).predict_latency_ms(requests)
    assert found.shape == (len(requests), len(SPACE))
    for row, request in enumerate(requests):
        for number, setting in enumerate(SPACE):
            [output] = executor.run([replace(request, setting=setting)])
            counts = {name: [count] for name, count in output.counts.items()}
            typical = estimator.predict_latency_ms([setting], counts, [executor.max_new_tokens])
            assert found[row, number].item() == pytest.approx(QUANTILES[str(quantile)] * typical.item(), rel=1e-6)
    # The sideways image is tiled like the upright one, not like its pixels lie.
    high = SPACE.index(KnobSetting(tier="high", top_k=1, num_blocks=2))
    assert found[5, high] != found[2, high]


def test_what_fits_is_what_is_predicted_below_the_budget(executor, estimator):
    latency_ms = Guardrail(estimator, executor).predict_latency_ms(make_requests())
    budget = latency_ms[0].median().item()
    fits, fits_budget = settings_that_fit(latency_ms, budget)
    assert torch.equal(fits, latency_ms <= budget)
    assert fits_budget.all() and 0 < fits.double().mean() < 1
    # A budget that not even the cheapest setting of some requests keeps.
    cheapest = latency_ms[:, SPACE.index(SPACE.cheapest)]
    assert (cheapest == latency_ms.amin(1)).all()
    fits, fits_budget = settings_that_fit(latency_ms, cheapest.median().item())
    assert fits_budget.tolist() == (cheapest <= cheapest.median()).tolist() and not fits_budget.all()
    for mask in fits[~fits_budget]:
        assert mask.nonzero().tolist() == [[SPACE.index(SPACE.cheapest)]]


@pytest.mark.slow
def test_one_request_takes_no_time(executor, estimator):
    """Half a millisecond, at the fastest: other processes may share the core."""
    guardrail, request = Guardrail(estimator, executor), make_requests()[:1]
    seconds = []
    for _ in range(100):
        started = time.perf_counter()
        settings_that_fit(guardrail.predict_latency_ms(request), 10.0)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.0005


def test_estimators_that_cannot_promise_are_refused(executor, estimator):
    with pytest.raises(ValueError, match=r"no quantile 0.8 \(it has \['0.9', '0.95', '0.99'\]\)"):
        Guardrail(estimator, executor, 0.8)
    config = LatencyEstimatorConfig(
        **{**estimator.config.to_dict(), "fitted_knobs": {"top_k": [1, 2], "num_blocks": [2, 4]}}
    )
    narrow = LatencyEstimatorModel(config)
    narrow.load_state_dict(estimator.state_dict())
    with pytest.raises(ValueError, match="knob `top_k` is 4 but the latency estimator was fitted on 1 to 2"):
        Guardrail(narrow, executor)
    with pytest.raises(ValueError, match="recorded latencies say nothing about other requests"):
        Guardrail(RecordedLatencies(), executor)


def test_without_a_quantile_latencies_are_predicted_and_nothing_is_promised(executor, estimator):
    guardrail, request = Guardrail(estimator, executor, None), make_requests()[0]
    assert guardrail.upper_ratio is None and Guardrail(estimator, executor, 0.9).upper_ratio == pytest.approx(
        QUANTILES["0.9"]
    )
    prediction = guardrail.predict([request])
    for number, setting in enumerate(SPACE):
        counts = executor.count_inputs(request, [setting])
        for output_tokens in (1, executor.max_new_tokens):
            [expected] = estimator.predict_latency_ms([setting], counts, [output_tokens]).tolist()
            assert prediction.typical_ms(0, number, output_tokens) == pytest.approx(expected, rel=1e-6)
    assert (guardrail.predict_latency_ms([request]) == 0).all()
    too_long = replace(request, question="star " * 1000)
    assert guardrail.predict_latency_ms([too_long]).isinf().all()

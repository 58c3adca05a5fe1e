"""The guardrail against the latency of every setting, predicted one by one from what the executor encodes."""

import math
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from joint_controller import KnobSetting, LatencyEstimatorConfig, LatencyEstimatorModel
from joint_controller.executor import ExecutorRequest
from joint_controller.latency import FitCache, Guardrail, RecordedLatencies
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
    for stage in model.costs.stages:
        parameters = [
            torch.rand(parameter.shape, generator=generator) / 10 for parameter in model.stage_parameters(stage)
        ]
        model.set_stage_parameters(stage, *parameters)
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
    guardrail = Guardrail(estimator, executor)
    requests = make_requests()
    upper_ms, typical_ms = guardrail.predict_latency_ms(requests), guardrail.typical_ms(requests)
    torch.testing.assert_close(upper_ms, QUANTILES["0.95"] * typical_ms)
    # Between two latencies, so that rounding plays no part.
    budget = upper_ms[0].sort().values[len(SPACE) // 2 - 1 :][:2].mean().item()
    typical_budget_ms, fit = guardrail.fit(typical_ms, budget)
    assert typical_budget_ms == pytest.approx(budget / QUANTILES["0.95"])
    assert torch.equal(fit.fits, upper_ms <= budget)
    assert fit.fits_budget.all() and 0 < fit.fits.double().mean() < 1
    torch.testing.assert_close(fit.slack, (1 - upper_ms / budget).clamp(-1, 1))
    # A budget that not even the cheapest setting of some requests keeps.
    cheapest = upper_ms[:, SPACE.index(SPACE.cheapest)]
    assert (cheapest == upper_ms.amin(1)).all()
    budgets = torch.full((len(requests),), cheapest.median().item() * 1.0001)
    typical_budgets_ms, fit = guardrail.fit(typical_ms, budgets)
    torch.testing.assert_close(typical_budgets_ms, budgets / QUANTILES["0.95"])
    assert fit.fits_budget.tolist() == (cheapest <= cheapest.median()).tolist() and not fit.fits_budget.all()
    for mask in fit.fits[~fit.fits_budget]:
        assert mask.nonzero().tolist() == [[SPACE.index(SPACE.cheapest)]]


def test_another_ratio_than_its_own_decides_where_it_is_given(executor, estimator):
    """As a tracker of the machine's drift gives it."""
    guardrail = Guardrail(estimator, executor)
    typical_ms = guardrail.typical_ms(make_requests())
    budget = 3 * typical_ms[0].median().item()
    typical_budget_ms, fit = guardrail.fit(typical_ms, budget, upper_ratio=2.0)
    assert typical_budget_ms == budget / 2
    assert torch.equal(fit.fits_budget, (2 * typical_ms <= budget).any(1))
    assert torch.equal(fit.fits[fit.fits_budget], (2 * typical_ms <= budget)[fit.fits_budget])


def test_the_typical_quantile_needs_no_fitted_one(executor, estimator):
    config = LatencyEstimatorConfig(**{**estimator.config.to_dict(), "upper_quantiles": None})
    without = LatencyEstimatorModel(config)
    without.load_state_dict(estimator.state_dict())
    guardrail, requests = Guardrail(without, executor, 0.5), make_requests()
    assert guardrail.upper_ratio == 1.0
    typical_ms = guardrail.typical_ms(requests)
    assert torch.equal(guardrail.predict_latency_ms(requests), typical_ms)
    budget = typical_ms[0].median().item()
    assert torch.equal(guardrail.fit(typical_ms, budget)[1].fits[0], typical_ms[0] <= budget)


@pytest.mark.parametrize("quantile", [0.95, None])
@pytest.mark.parametrize("budget", [1e-6, 0.5, 1.0, 2.0])
def test_one_request_is_predicted_as_among_many(executor, estimator, quantile, budget, monkeypatch):
    guardrail, requests = Guardrail(estimator, executor, quantile), make_requests()
    # The prompt of the last is too long at some settings.
    medium = KnobSetting(tier="medium", top_k=1, num_blocks=2)
    lengths = executor.count_inputs(requests[-1], [medium])
    monkeypatch.setattr(executor, "max_prompt_tokens", lengths["vision_tokens"][0] + lengths["text_tokens"][0])
    typical_ms = guardrail.typical_ms(requests)
    assert 0 < typical_ms[-1].isinf().sum() < len(SPACE)
    budget_ms = budget * typical_ms[0].median().item()
    typical_budget_ms, fit = guardrail.fit(typical_ms, torch.full((len(requests),), budget_ms), 1.3)
    for row, request in enumerate(requests):
        prediction = guardrail.predict_one(request)
        counts = executor.count_inputs(request, SPACE.settings)
        lengths = [sum(row) for row in zip(counts["vision_tokens"], counts["text_tokens"], strict=True)]
        assert list(prediction.prompt_tokens) == lengths
        for number, setting in enumerate(SPACE):
            of_setting = {name: [values[number]] for name, values in counts.items()}
            for output_tokens in (1, executor.max_new_tokens):
                [expected] = estimator.predict_latency_ms([setting], of_setting, [output_tokens]).tolist()
                assert prediction.typical_ms(number, output_tokens) == pytest.approx(expected, rel=1e-6)
        one_budget_ms, one = guardrail.fit_one(prediction, budget_ms, 1.3)
        assert one_budget_ms == pytest.approx(typical_budget_ms[row].item())
        assert one.fits == fit.fits[row].tolist() and one.fits_budget == fit.fits_budget[row].item()
        assert one.slack == pytest.approx(fit.slack[row].tolist(), abs=1e-6)


def test_one_request_is_predicted_by_other_estimators_as_well(executor, estimator):
    class Other:
        """Knows no stages."""

        latency_scope, way = "request", None

        def predict_latency_ms(self, settings, counts, output_tokens, quantile=None):
            return estimator.predict_latency_ms(settings, counts, output_tokens, quantile)

    request = make_requests()[1]
    other, own = (Guardrail(one, executor).predict_one(request) for one in (Other(), estimator))
    assert other.first_token_ms == pytest.approx(own.first_token_ms, rel=1e-6)
    assert other.all_tokens_ms == pytest.approx(own.all_tokens_ms, rel=1e-6)
    assert (other.prompt_tokens, other.max_new_tokens) == (own.prompt_tokens, own.max_new_tokens)


def as_samples(requests):
    return [
        {"sample_id": one.sample_id, "image": one.load_image(), "question": one.question, "style": one.style}
        for one in requests
    ]


def test_samples_are_predicted_once_whatever_their_budgets(executor, estimator, monkeypatch):
    requests = make_requests()
    guardrail, predicted = Guardrail(estimator, executor), []
    expected = guardrail.typical_ms(requests)
    typical_ms = Guardrail.typical_ms
    monkeypatch.setattr(Guardrail, "typical_ms", lambda self, rows: predicted.extend(rows) or typical_ms(self, rows))
    samples, cache = as_samples(requests), FitCache(guardrail)
    torch.testing.assert_close(cache.typical_ms(samples[:3]), expected[:3])
    order = [4, 0, 2, 0]
    torch.testing.assert_close(cache.typical_ms([samples[row] for row in order]), expected[order])
    budgets = torch.linspace(1.0, 2.0, len(samples)) * expected.median()
    found, fit = cache.fit(samples, budgets)
    torch.testing.assert_close(found, budgets / QUANTILES["0.95"])
    assert torch.equal(fit.fits, guardrail.fit(cache.typical_ms(samples), budgets)[1].fits)
    assert sorted(one.sample_id for one in predicted) == sorted(one.sample_id for one in requests)


@pytest.mark.slow
def test_one_request_takes_no_time(executor, estimator):
    """A fifth of a millisecond, at the fastest, for an image of a new size: other processes may share the core."""
    guardrail, request = Guardrail(estimator, executor), make_requests()[0]
    seconds = []
    for side in range(100, 200):
        request = replace(request, image=Image.new("RGB", (side, side)))
        started = time.perf_counter()
        guardrail.fit_one(guardrail.predict_one(request), 10.0)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.0002


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
    prediction = guardrail.predict_one(request)
    for number, setting in enumerate(SPACE):
        counts = executor.count_inputs(request, [setting])
        for output_tokens in (1, executor.max_new_tokens):
            [expected] = estimator.predict_latency_ms([setting], counts, [output_tokens]).tolist()
            assert prediction.typical_ms(number, output_tokens) == pytest.approx(expected, rel=1e-6)
    assert (guardrail.predict_latency_ms([request]) == 0).all()
    too_long = replace(request, question="star " * 1000)
    assert guardrail.typical_ms([too_long]).isinf().all()
    # Budgets are those of typical latencies, and what does not keep them is only told apart.
    typical_ms = guardrail.typical_ms([request, too_long])
    budget_ms, fit = guardrail.fit(typical_ms, typical_ms[0].median().item())
    assert budget_ms == typical_ms[0].median().item() and fit.fits[0].all()
    assert fit.fits[1].nonzero().tolist() == [[0]] and fit.fits_budget.tolist() == [True, False]
    assert (fit.slack[0] < 0).any() and (fit.slack[1] == -1).all() and math.isfinite(fit.slack.sum())

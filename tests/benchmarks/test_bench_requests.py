"""Requests of benchmarks have the crops and the tokens that are asked for, in the words of the executor's tokenizer."""

from dataclasses import replace

import pytest

from joint_controller.benchmarks.executor_checks import measure_grid
from joint_controller.benchmarks.requests import RequestMaker, remember_images
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.molmo.knob_space import build_knob_space
from joint_controller.request_path import RequestPath


SPACE = build_knob_space({"low": (1, 1), "high": (5, 9)}, top_k=(1, 2), num_blocks=(4,))


@pytest.fixture(scope="module")
def executor(tiny_molmo, tiny_processor):
    return MolmoExecutor(tiny_molmo, tiny_processor, SPACE, max_new_tokens=3)


@pytest.fixture(scope="module")
def maker(executor):
    return RequestMaker(executor, seed=3)


@pytest.mark.parametrize(("tier", "num_crops"), [("low", 1), ("high", 6), ("high", 9)])
@pytest.mark.parametrize("num_tokens", [0, 280])
def test_a_request_has_as_many_crops_and_tokens_as_asked_for(executor, maker, tier, num_crops, num_tokens):
    setting = next(setting for setting in SPACE if setting["tier"] == tier)
    request = maker.make("one", setting, num_crops, num_tokens, seed=1)
    times = RequestPath(executor).time(request, repeats=1, warmup=0, decode_steps=1)
    assert times.counts["num_views"] == 1 + num_crops
    length = times.counts["vision_tokens"] + times.counts["text_tokens"]
    assert length == num_tokens if num_tokens else len(request.question.split()) == 5
    again = maker.make("one", setting, num_crops, num_tokens, seed=1)
    assert again.question == request.question and again.image.tobytes() == request.image.tobytes()


def test_crops_that_no_image_has_are_refused(maker):
    assert maker.crops_of("low") == [1] and maker.crops_of("high") == [6, 8, 9]
    with pytest.raises(ValueError, match="no image has 7 crops at tier 'high'"):
        maker.make("one", SPACE.full, 7, 0, seed=1)


def test_mixed_requests_are_of_all_tiers_and_each_sample_has_one_image_a_tier(maker):
    requests = maker.mixed(40, 5, "mixed")
    assert {request.setting["tier"] for request in requests} == {"low", "high"}
    images = {(request.sample_id, request.setting["tier"]): request.image for request in requests}
    assert all(request.image is images[request.sample_id, request.setting["tier"]] for request in requests)
    assert [str(one.setting) for one in requests] == [str(one.setting) for one in maker.mixed(40, 5, "mixed")]
    assert [one.question for one in requests] != [one.question for one in maker.mixed(40, 5, "other")]


def test_an_image_is_cut_once_for_a_question_at_a_tier(executor, maker):
    request = maker.make("one", SPACE.full, 9, 0, seed=1)
    with remember_images(executor):
        prepare = executor.encoder.prepare
        first = prepare(request, request.image, "high")
        assert prepare(request, request.image, "high") is first
        other = prepare(replace(request, question="a star"), request.image, "high")
        assert other.counts["text_tokens"] == first.counts["text_tokens"] - 3
        assert prepare(request, request.image, "low").counts["num_views"] == 2
    assert executor.encoder.prepare(request, request.image, "high") is not first


def test_the_grid_compares_every_pair_of_neighbours_of_an_executor(executor, maker):
    results = measure_grid(executor, maker, repeats=1, decode_steps=1)
    assert results["settings"] == 4
    assert {knob: found["neighbours"] for knob, found in results["knobs"].items()} == {"tier": 2, "top_k": 2}
    assert results["measurements"] >= 4 + 2 * 4
    assert 0 < results["cheapest_ms"] < 10_000 and results["smallest_ratio"] > 0

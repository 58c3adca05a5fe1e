"""The way of one request: its stages partition the time of the call, and decisions are followed or only timed."""

import gc
import time

import pytest
from molmo_knobs import molmo_setting
from PIL import Image

from joint_controller import JointControllerConfig, JointControllerModel
from joint_controller.controller import RequestController
from joint_controller.executor import ExecutorRequest
from joint_controller.molmo.executor import MolmoExecutor
from joint_controller.request_path import RequestPath


QUESTION = "is there a star ?"


@pytest.fixture(scope="module")
def executor():
    return MolmoExecutor.from_pretrained("embedded", max_new_tokens=3)


@pytest.fixture(scope="module")
def image():
    return Image.new("RGB", (48, 40), "red")


def new_controller(executor) -> JointControllerModel:
    """One that chooses medium, top_k 2, 5 blocks."""
    sizes = {"question_size": executor.question_size, "vision_size": executor.vision_size}
    controller = JointControllerModel(JointControllerConfig(knob_space=executor.knob_space.to_dict(), **sizes))
    # The second value of each knob.
    for stage, module in enumerate((controller.stage1, controller.stage2)):
        [wanted] = (controller.table.values[stage] == 1).all(dim=1).nonzero()
        module.head.linears[0].bias.data[wanted] = 1.0
    return controller


def test_stages_are_the_time_of_the_call(executor, image):
    path = RequestPath(executor, RequestController(new_controller(executor)))
    request = ExecutorRequest("one", image, QUESTION, "vqa2", executor.knob_space.full)
    path.answer(request, 20.0)
    unaccounted = []
    for _ in range(20):
        started = time.perf_counter()
        times = path.answer(request, 20.0).times
        unaccounted.append(1000 * (time.perf_counter() - started) - times.total_ms)
    assert tuple(times.stage_ms) == ("overhead", "controller", "image_processing", "vision", "llm_prefill")
    assert all(ms > 0 for ms in times.stage_ms.values()) and len(times.decode_ms) == times.output_tokens - 1
    assert min(unaccounted) < 0.2  # of some ten milliseconds


def test_the_controllers_setting_is_followed_unless_one_is_given(executor, image):
    path = RequestPath(executor, RequestController(new_controller(executor)))
    request = ExecutorRequest("one", image, QUESTION, "vqa2", executor.knob_space.full)
    chosen = molmo_setting("medium", 2, 5)
    assert path.answer(request, 20.0).output == executor.run([request.at(chosen)])[0]
    given = executor.knob_space.full
    answer = path.answer(request, 20.0, given, decode_steps=4)
    assert answer.output.setting == given and answer.output.counts == executor.run([request])[0].counts
    assert answer.output.output_tokens == 5 == 1 + len(answer.times.decode_ms)


def test_without_a_controller_a_setting_is_needed(executor, image):
    path = RequestPath(executor)
    request = ExecutorRequest("one", image, QUESTION, "vqa2", executor.knob_space.cheapest)
    with pytest.raises(ValueError, match="no controller to choose a setting"):
        path.answer(request, 20.0)
    assert path.answer(request, 20.0, executor.knob_space.cheapest).output == executor.run([request])[0]


def test_times_are_medians_at_the_requests_setting(executor, image):
    path = RequestPath(executor)
    request = ExecutorRequest("one", lambda: image, QUESTION, "vqa2", executor.knob_space.full)
    times = path.time(request, repeats=3, warmup=1)
    output = executor.run([request])[0]
    assert times.counts == output.counts and tuple(times.counts) == executor.count_names
    assert times.output_tokens == output.output_tokens == len(times.decode_ms) + 1
    assert times.total_ms == pytest.approx(sum(times.stage_ms.values()) + sum(times.decode_ms))
    assert len(path.time(request, repeats=1, warmup=0, decode_steps=9).decode_ms) == 9
    with pytest.raises(ValueError, match="`repeats` is 0"):
        path.time(request, repeats=0)
    with pytest.raises(ValueError, match="top_k=3.*outside the knob space"):
        path.time(request.at(molmo_setting("high", 3, 4)))


def test_the_controllers_time_is_apart(executor, image):
    class Slow(RequestController):
        def choose_stage1(self, *inputs):
            time.sleep(0.4)
            return super().choose_stage1(*inputs)

        def choose_stage2(self, *inputs):
            time.sleep(0.6)
            return super().choose_stage2(*inputs)

    model = new_controller(executor)
    request = ExecutorRequest("one", image, QUESTION, "vqa2", executor.knob_space.cheapest)
    quick = RequestPath(executor, RequestController(model)).time(request, repeats=3, decode_steps=2)
    slow = RequestPath(executor, Slow(model)).time(request, repeats=1, warmup=0, decode_steps=2)
    assert 0 < quick.stage_ms["controller"] < 400 and 1000 <= slow.stage_ms["controller"] < 2000
    others = [ms for stage, ms in slow.stage_ms.items() if stage != "controller"]
    assert max(*others, *slow.decode_ms) < 400


def test_garbage_is_collected_between_requests(executor, image):
    """However much there is, and whether the request is answered or refused."""
    path = RequestPath(executor)
    request = ExecutorRequest("one", image, QUESTION, "vqa2", executor.knob_space.cheapest)
    collected = []

    def watch(phase, info):
        collected.append(phase)

    gc.callbacks.append(watch)
    threshold = gc.get_threshold()
    try:
        gc.set_threshold(1, 1, 1)  # at nearly every object
        path.answer(request, 20.0, request.setting)
        during = len(collected)
        kept = [[] for _ in range(100)]
    finally:
        gc.callbacks.remove(watch)
        gc.set_threshold(*threshold)
    assert len(kept) == 100 and len(collected) > during + 10 > 10
    assert during < 20  # a request makes thousands of objects
    with pytest.raises(ValueError, match="outside the knob space"):
        path.answer(request, 20.0, molmo_setting("high", 3, 4))
    assert gc.isenabled()

"""
An executor family that only tests know: four knobs of other names, of every type, in mixed order, two of them decided in
stage 1; other counts, other stages. Its answers and its times are formulas.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from joint_controller.executor import ExecutorOutput, StageCost, StageTerms, register_executor_family
from joint_controller.knobs import Knob, KnobSpace


KNOBS = (
    Knob("patience", (0.25, 0.5, 1.0), stage=2, description="how long it thinks"),
    Knob("zoom", (1, 2, 4), stage=1, description="how closely it looks"),
    Knob("palette", ("gray", "color"), stage=1, meanings=(1, 3), description="channels of the image"),
    Knob("helpers", (1, 2), stage=2, description="how many think"),
)
SIZE = 12
STAGES = ("fetching", "looking", "thinking")


class ToyCounter:
    """Pixels follow from the image's size, the zoom and the palette."""

    count_names = ("pixels", "prompt_tokens")
    max_prompt_tokens = 100

    def __init__(self, knob_values, max_new_tokens=16):
        values = {
            knob.name: [knob.parse(value) if isinstance(value, str) else value for value in knob_values[knob.name]]
            for knob in KNOBS
            if knob.name in knob_values
        }
        self.knob_space = KnobSpace(KNOBS)
        self.knob_space.check_names(knob_values)
        self.knob_space = self.knob_space.restrict(values)
        self.max_new_tokens = max_new_tokens

    def count_inputs(self, request, settings):
        width, height = request.load_image().size
        palette = KnobSpace(KNOBS)["palette"]
        return {
            "pixels": [width * height * one["zoom"] * palette.meaning(one["palette"]) for one in settings],
            "prompt_tokens": [2 + len(request.question.split())] * len(settings),
        }


class ToyExecutor(ToyCounter):
    model_type = "toy_thinker"
    question_size, vision_size = SIZE, SIZE + 2
    stage_names = STAGES
    device = torch.device("cpu")
    dtype, mode = "float32", "by formula"
    prefill_lengths = None

    def __init__(self, shape, knob_values, knob_space=None, max_new_tokens=16):
        super().__init__(knob_values, max_new_tokens)
        self.shape = shape
        self.knob_space = knob_space or self.knob_space
        self.num_run = 0

    @property
    def fingerprint(self):
        return f"toy {self.shape} {self.max_new_tokens}"

    def question_features(self, questions):
        return torch.stack([_direction(question.split()[0], SIZE) for question in questions])

    def vision_features(self, requests):
        brightness = [float(np.asarray(request.load_image()).mean()) / 255 for request in requests]
        sharpness = [_direction(f"{one.setting['zoom']} {one.setting['palette']}", SIZE + 2) for one in requests]
        return torch.stack([bright + sharp for bright, sharp in zip(brightness, sharpness, strict=True)])

    def run(self, requests, on_batch=None, progress=False):
        outputs = []
        for request in requests:
            assert request.setting in self.knob_space
            self.num_run += 1
            right = NEEDS.get(request.question.split()[0], NEEDS["easy"])(request.setting)
            counts = {name: count for name, [count] in self.count_inputs(request, [request.setting]).items()}
            outputs.append(ExecutorOutput(request.sample_id, request.setting, "yes" if right else "no", counts, 2))
        if on_batch is not None:
            on_batch(outputs)
        return outputs

    def open(self, request, clock):
        return ToyOpenRequest(self, request, clock)

    def warm_up(self, progress=False):
        pass


class ToyOpenRequest:
    """A request that takes no time: [`FormulaClock`] is told what each stage takes."""

    def __init__(self, executor, request, clock):
        self.executor, self.request, self.clock = executor, request, clock
        self.question_features = executor.question_features
        self.count_inputs = executor.count_inputs

    def vision_features(self, requests):
        [request] = requests
        counts = {name: count for name, [count] in self.count_inputs(request, [request.setting]).items()}
        self.clock.take("fetching", 0.5)
        self.clock.take("looking", 1.0 + 0.002 * counts["pixels"])
        return self.executor.vision_features(requests)

    def answer(self, setting, decode_steps=None):
        [output] = self.executor.run([replace(self.request, setting=setting)])
        think = setting["patience"] * setting["helpers"]
        self.clock.take("thinking", 2.0 + think * (4.0 + 0.2 * output.counts["prompt_tokens"]))
        for _ in range(1 if decode_steps is None else decode_steps):
            self.clock.take("decode", 0.5 + 0.5 * think)
        return output if decode_steps is None else replace(output, output_tokens=1 + decode_steps)


class FormulaClock:
    """Takes the place of a [`StageClock`]: the controller takes 0.2 ms, the rest 0.1 ms, and the stages what they say."""

    def __init__(self, device):
        self.times = {"overhead": [0.1], "controller": [0.2]}

    def take(self, stage, ms):
        self.times.setdefault(stage, []).append(ms)

    def stop(self, stage):
        return self.times


# What each kind of question takes to be answered rightly.
NEEDS = {
    "easy": lambda setting: True,
    "small": lambda setting: setting["zoom"] == 4,
    "colorful": lambda setting: setting["palette"] == "color",
    "hard": lambda setting: setting["patience"] == 1.0 and setting["helpers"] == 2,
}


class ToyCostModel:
    count_names = ToyCounter.count_names
    knob_names = ("patience", "helpers")
    stages = {
        "fetching": StageCost(("constant",), ("pixels",), scope="request"),
        "looking": StageCost(("constant", "pixels"), ("pixels",)),
        "thinking": StageCost(("constant", "thought", "tokens x thought"), ("tokens", "thought")),
        "decode": StageCost(("constant", "thought"), ("thought",)),
    }

    def terms(self, stage, columns):
        one = torch.ones_like(columns["pixels"])
        thought = columns["patience"] * columns["helpers"]
        tokens = columns["prompt_tokens"]
        return {
            "fetching": StageTerms((one,), (columns["pixels"],)),
            "looking": StageTerms((one, columns["pixels"]), (columns["pixels"],)),
            "thinking": StageTerms((torch.ones_like(tokens), thought, tokens * thought), (tokens, thought)),
            "decode": StageTerms((torch.ones_like(thought), thought), (thought,)),
        }[stage]

    def request_flops(self, setting, counts, output_tokens):
        return counts["pixels"] * 10 + counts["prompt_tokens"] * 1000


class ToyFamily:
    model_type = ToyExecutor.model_type
    random_names = ("toy-tiny",)
    code_folders = ()

    def load_executor(self, folder, device, dtype, knob_values, knob_space, max_new_tokens=16, **options):
        return ToyExecutor(self.shape_of(folder), knob_values, knob_space, max_new_tokens)

    def load_input_counter(self, folder, knob_values, max_new_tokens):
        return ToyCounter(knob_values, max_new_tokens)

    def make_random_executor(self, name, device, dtype, knob_values, knob_space, seed, **options):
        return ToyExecutor({"thinkers": seed}, knob_values, knob_space)

    def shape_of(self, folder):
        return {"thinkers": json.loads((Path(folder) / "config.json").read_text())["thinkers"]}

    def cost_model(self, shape, prefill_lengths, knob_names):
        return ToyCostModel()


TOY_FAMILY = ToyFamily()


def register_toy_family() -> None:
    register_executor_family(TOY_FAMILY)


def make_checkpoint(folder: Path, thinkers: int = 3) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": ToyExecutor.model_type, "thinkers": thinkers}))
    return folder


def _direction(name: str, size: int) -> torch.Tensor:
    seed = int.from_bytes(name.encode()[-6:], "big") % 2**31
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))

"""A new executor, as docs/extending.md writes it, taken through profile, fit, training and pipeline."""

import importlib
import json
import shlex
import sys

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from pages import DOCS, code_blocks
from PIL import Image, ImageDraw

from joint_controller import JointPipeline, KnobSetting, load_executor
from joint_controller.cli import main
from joint_controller.executor import ExecutorRequest
from joint_controller.latency import read_latency_estimator
from joint_controller.request_path import RequestPath


PAGE, SECTION = DOCS / "extending.md", "A new executor"
COLORS = ("red", "blue", "green", "yellow", "purple", "orange")
TINY = """
--max_train_samples 12 --max_eval_samples 6 --max_test_samples 6 --max_static_samples 6 --max_new_tokens 3
--per_device_train_batch_size 16 --num_generations 4 --max_steps 6 --eval_steps 3 --save_steps 3 --use_cpu true
--latency_budget_min_ms 30 --latency_budget_max_ms 60 --sweep_budget_fractions 20 40 --disable_tqdm true
"""
FEW_FITS = "--num_folds 2 --num_units 4"


def draw(color: str, side: int) -> Image.Image:
    """A square of a color on white."""
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).rectangle((40, 40, 40 + side, 40 + side), fill=color)
    return image


def make_data_set(folder):
    folder.mkdir()
    strings = Value("string")
    features = Features(
        {"image": ImageFeature(), "question": strings, "answers": List(strings), "metric": strings, "style": strings}
    )
    for split in ("train", "validation", "test"):
        rows = {
            "image": [draw(COLORS[row % 6], 20 + row) for row in range(12)],
            "question": ["what colors are there ?"] * 12,
            "answers": [[f"white {COLORS[row % 6]}"] for row in range(12)],
            "metric": ["exact_match"] * 12,
            "style": ["vqa2"] * 12,
        }
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the page has written: the family, the command, a checkpoint, a data set; the family is registered."""
    folder = tmp_path_factory.mktemp("color_namer")
    *family, command = code_blocks(PAGE, "python", SECTION)
    assert family[0].startswith("# color_namer.py\n") and command.startswith("# my_controller.py\n")
    (folder / "color_namer.py").write_text("\n\n".join(family))
    (folder / "my_controller.py").write_text(command)
    (folder / "models" / "colors").mkdir(parents=True)
    (folder / "models" / "colors" / "config.json").write_text(json.dumps({"model_type": "color_namer", "size": 1}))
    make_data_set(folder / "shop_vqa")
    sys.path.insert(0, str(folder))
    importlib.import_module("color_namer")
    sys.path.remove(str(folder))
    return folder


def test_it_answers_at_its_knobs(folder):
    executor = load_executor(folder / "models" / "colors", knob_values={"side": ["8", "128"]})
    assert executor.knob_space.values == {"side": (8, 128), "colors": (4, 8)}
    image = draw("orange", 60)
    settings = [KnobSetting(side=128, colors=colors) for colors in (4, 8)]
    requests = [ExecutorRequest("one", image, "what colors are there ?", "vqa2", setting) for setting in settings]
    few, many = executor.run(requests)
    assert (few.answer, many.answer) == ("white red", "white orange")
    assert many.counts == {"pixels": 128**2, "prompt_tokens": 5} and many.output_tokens == 3
    times = RequestPath(executor).time(requests[0], repeats=1, warmup=0, decode_steps=2)
    assert set(times.stage_ms) - {"overhead", "controller"} == set(executor.stage_names) and len(times.decode_ms) == 2
    assert np.isfinite([*times.stage_ms.values(), *times.decode_ms]).all()


@pytest.mark.slow
def test_the_commands_of_the_page_work(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    [block] = code_blocks(PAGE, "bash", SECTION)
    for line in block.splitlines():
        python, script, *flags = shlex.split(line)
        assert (python, script) == ("python", "my_controller.py")
        tiny = shlex.split({"train": TINY, "fit-latency": FEW_FITS}.get(flags[0], ""))
        assert main([*flags, *tiny]) == 0, line

    estimator = read_latency_estimator(folder / "outputs" / "latency")
    counts = {"pixels": [[64], [128**2]], "prompt_tokens": [[5], [5]]}
    cheap, expensive = estimator.predict_latency_ms([KnobSetting(side=8, colors=4)], counts, [[3], [3]]).flatten()
    assert 0 < cheap < expensive

    sweep = Dataset.from_parquet(str(folder / "outputs" / "colors" / "sweep.parquet"), cache_dir=str(folder / "cache"))
    assert "controller" in sweep["policy"]
    assert "| `side` | 8, 32, 128 | stage 1 |" in (folder / "outputs" / "colors" / "README.md").read_text()
    pipeline = JointPipeline.from_pretrained("outputs/colors", model_path="models/colors")
    result = pipeline(draw("red", 60), "what colors are there ?", latency_budget_ms=50)
    assert result.answer == "white red" and set(result.setting) == {"side", "colors"}

"""A fourth knob of Molmo, as docs/extending.md adds it: to a copy of the package, whose tests and commands then run."""

import os
import shutil
import subprocess
import sys

import pytest
from pages import DOCS, REPOSITORY, code_blocks


PAGE, SECTION = DOCS / "extending.md", "A new knob"
MOST_FILES = 4

# What the page promises of the rest of the package: it is run in the copy, behind the page's own test.
FOLLOWS = '''
import os
from pathlib import Path

from PIL import Image

from joint_controller import JointControllerModel, JointPipeline, cli

TINY = """
--max_train_samples 12 --max_eval_samples 4 --max_test_samples 4 --max_static_samples 2 --per_device_train_batch_size 8
--max_steps 8 --eval_steps 8 --save_steps 8 --use_cpu true
"""


def test_everything_else_follows(tmp_path):
    assert Path(cli.__file__).is_relative_to(Path.cwd())
    command = os.environ["COMMAND"].split()[1:]
    assert cli.main([*command, *TINY.split(), "--output_dir", str(tmp_path)]) == 0
    controller = JointControllerModel.from_pretrained(tmp_path)
    assert controller.knob_space.names == ("tier", "top_k", "num_blocks", "image_share")
    assert controller.knob_space.values["image_share"] == (0.5, 1.0)
    card = (tmp_path / "README.md").read_text()
    assert "Sets 4 knobs" in card and "| `image_share` | 0.5, 1.0 | stage 2 |" in card
    assert "knobs/image_share=0.5" in (tmp_path / "joint_controller_training.log").read_text()
    result = JointPipeline.from_pretrained(tmp_path)(Image.new("RGB", (96, 96), "red"), "what is it ?", 40)
    assert result.setting["image_share"] in (0.5, 1.0)
'''


def apply_diff(diff: str, folder) -> str:
    """
    Applies a unified diff whose hunks have no line numbers: the lines that a hunk expects are there once. Returns the path
    of the file.
    """
    header, *hunks = diff.split("\n@@\n")
    path = header.splitlines()[1].removeprefix("+++ b/")
    text = (folder / path).read_text(encoding="utf-8")
    for hunk in hunks:
        lines = hunk.rstrip("\n").split("\n")
        before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        assert text.count(before) == 1, (
            f"{path} has {text.count(before)} times what docs/extending.md changes:\n{before}"
        )
        text = text.replace(before, after)
    (folder / path).write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(REPOSITORY / "joint_controller", folder / "joint_controller", ignore=lambda *_: {"assets"})
    (folder / "joint_controller" / "assets").symlink_to(REPOSITORY / "joint_controller" / "assets")
    (folder / "recipes").symlink_to(REPOSITORY / "recipes")
    return folder


@pytest.mark.slow
def test_a_fourth_knob_of_molmo_touches_four_files(copy):
    changed = [apply_diff(diff, copy) for diff in code_blocks(PAGE, "diff", SECTION)]
    [test] = code_blocks(PAGE, "python", SECTION)
    [command] = code_blocks(PAGE, "bash", SECTION)
    assert test.startswith("# tests/molmo/test_image_share.py\n")
    assert len({*changed, "tests/molmo/test_image_share.py"}) <= MOST_FILES

    (copy / "test_image_share.py").write_text(test)
    (copy / "test_follows.py").write_text(FOLLOWS)
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "COMMAND": command}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_image_share.py", "test_follows.py"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-6000:]

import importlib
import subprocess
import sys

import pytest

import joint_controller


def test_public_names_are_imported_on_first_use():
    for name in joint_controller.__all__:
        assert getattr(joint_controller, name) is not None
    assert {"KnobSpace", "MolmoProcessor", "JointGRPOTrainer", "LatencyEstimatorModel"} <= set(dir(joint_controller))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = joint_controller.Nothing


def test_the_table_of_lazy_names_is_whole():
    assert set(joint_controller._SUBMODULE_OF) == set(joint_controller.__all__) - {"__version__"}


def test_import_is_cheap():
    """Under 0.3 s, and without the libraries that take longer than that."""
    code = (
        "import sys, time; started = time.perf_counter(); import joint_controller; "
        "print(time.perf_counter() - started, *sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    seconds, *heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 0.3
    assert not heavy


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("joint_controller.controller", "joint_controller.molmo"),
        ("joint_controller.knobs", "joint_controller.controller"),
        ("joint_controller.executor", "joint_controller.outcomes"),
        ("joint_controller.outcomes", "joint_controller.trainer"),
        ("joint_controller.rewards", "joint_controller.trainer"),
        ("joint_controller.latency", "joint_controller.trainer"),
    ],
)
def test_imports_run_one_way(lower, higher):
    code = f"import sys, importlib; importlib.import_module('{lower}'); print('{higher}' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
    importlib.import_module(higher)

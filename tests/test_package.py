"""The package as a whole: its public names, and what importing them costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import joint_controller


LIBRARIES = {"datasets", "matplotlib", "numpy", "torch", "transformers", "trl", "yaml"}
"""Libraries that take long to import, or that not everything needs."""

# Each room, and what neither it nor those before it import.
ROOMS = [
    ("controller", {"joint_controller.executor", "datasets", "matplotlib", "trl"}),
    ("executor", {"joint_controller.latency", "joint_controller.outcomes", "datasets", "matplotlib", "trl"}),
    ("pipeline", {"joint_controller.evaluation", "joint_controller.data", "matplotlib", "trl"}),
    ("latency", {"joint_controller.rewards", "trl"}),
    ("outcomes", {"joint_controller.rewards", "trl"}),
    ("rewards", {"joint_controller.trainer", "trl"}),
    ("data", {"joint_controller.trainer", "joint_controller.evaluation", "trl"}),
    ("evaluation", {"joint_controller.trainer", "trl"}),
    ("trainer", {"joint_controller.scripts", "joint_controller.original_scripts"}),
    ("scripts", {"joint_controller.original_scripts", "joint_controller.benchmarks"}),
]


def imported_by(*statements):
    """Names of the modules that are there after each statement, run one after another in a process of its own."""
    code = "import sys\n" + "\n".join(f"{statement}\nprint(*sys.modules)" for statement in statements)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return [set(line.split()) for line in shown.splitlines()]


def test_public_names_are_imported_on_first_use():
    for name in joint_controller.__all__:
        assert getattr(joint_controller, name) is not None
    assert dir(joint_controller) == sorted(joint_controller.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = joint_controller.Nothing


def test_the_tables_of_lazy_names_agree():
    """What is imported when asked for, what is exported, and what type checkers see."""
    table = joint_controller._SUBMODULE_OF
    assert set(table) == set(joint_controller.__all__) - {"__version__"}
    [for_type_checking] = [
        node for node in ast.parse(Path(joint_controller.__file__).read_text()).body if isinstance(node, ast.If)
    ]
    assert {alias.name: f".{node.module}" for node in for_type_checking.body for alias in node.names} == table


@pytest.mark.parametrize(
    ("statement", "needed"),
    [
        ("import joint_controller", set()),
        ("from joint_controller import Knob, KnobSpace", set()),
        ("import joint_controller.cli", set()),
        ("import joint_controller.scripts", {"trl", "yaml"}),
    ],
)
def test_light_imports(statement, needed):
    [imported] = imported_by(statement)
    assert imported & LIBRARIES == needed


@pytest.mark.slow
def test_imports_run_one_way_and_no_room_names_a_model_family():
    imported = imported_by(*[f"import joint_controller.{room}" for room, _ in ROOMS])
    for (room, forbidden), modules in zip(ROOMS, imported, strict=True):
        assert f"joint_controller.{room}" in modules
        assert not (forbidden | {"joint_controller.molmo"}) & modules, room

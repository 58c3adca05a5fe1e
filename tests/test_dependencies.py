import ast
import configparser
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


REPOSITORY = Path(__file__).parents[1]

# Triton comes with torch's CUDA builds, which pin its version; CPU builds do without.
COMES_WITH_TORCH = {"triton"}


def read_setup():
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    return config


def declared(*extras):
    """Requirements in setup.cfg by name: those of the package, and those of its `extras`."""
    config = read_setup()
    lists = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    requirements = [Requirement(line) for text in lists for line in text.split()]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def imported_modules(folder):
    """Top-level names that the Python files below `folder` import from outside the standard library, with a place."""
    places = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                places.setdefault(name.split(".")[0], f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    return {name: place for name, place in places.items() if name not in sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("folder", "own", "extras"),
    [
        ("joint_controller", {"joint_controller"}, ["captions"]),
        # Modules beside the tests, and this package.
        ("tests", {"joint_controller", *(path.stem for path in (REPOSITORY / "tests").rglob("*.py"))}, ["test"]),
    ],
)
def test_every_import_is_declared(folder, own, extras):
    names, distributions = declared(*extras), packages_distributions()
    undeclared = {}
    for module, place in imported_modules(REPOSITORY / folder).items():
        providers = {canonicalize_name(name) for name in distributions.get(module, ())}
        if module not in own | COMES_WITH_TORCH and not providers & set(names):
            undeclared[module] = place
    assert not undeclared


def test_every_requirement_has_a_lower_and_an_upper_bound():
    for requirement in declared("captions", "test").values():
        assert sorted(bound.operator for bound in requirement.specifier) == ["<", ">="], str(requirement)


def test_extras_agree():
    """What two extras require, they require in the same versions."""
    captions, test = declared("captions"), declared("test")
    assert {name: test[name] for name in captions} == captions


def test_constraints_are_the_lower_bounds():
    script = REPOSITORY / ".ci" / "lower_bounds.py"
    output = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in output.split())}
    requirements = declared("test")
    del requirements["torch"]
    assert pinned.keys() == requirements.keys()
    for name, requirement in requirements.items():
        assert f">={pinned[name]}" in str(requirement.specifier).split(",")


def test_the_package_says_that_it_is_typed():
    assert (REPOSITORY / "joint_controller" / "py.typed").is_file()
    assert "py.typed" in read_setup()["options.package_data"]["joint_controller"].split()

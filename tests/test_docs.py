"""README and docs: links lead somewhere, commands and Python are what the package has, README stays short."""

import ast
import importlib
import re
import shlex

import pytest
import yaml
from pages import DOCS, PAGES, README, REPOSITORY, code_blocks, page_name, prose

from joint_controller import __version__, cli
from joint_controller.scripts import command_parser


MAX_README_WORDS = 950

pages = pytest.mark.parametrize("page", PAGES, ids=page_name)


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_to_files_and_headings_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert REPOSITORY in linked.parents, target
        assert not anchor or anchor in anchors(prose(linked)), target


def test_every_page_is_linked_from_readme():
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in README.read_text(encoding="utf-8"), page


def commands_of(page) -> list[list[str]]:
    """The arguments of every `joint-controller` command on a page, from blocks of code and from the text."""
    lines = [line for block in code_blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", prose(page).replace("\n", " "))
    lines = [
        line.replace("accelerate launch -m joint_controller.scripts.train", "joint-controller train") for line in lines
    ]
    return [shlex.split(line)[1:] for line in lines if line.startswith("joint-controller ") and "…" not in line]


@pages
def test_commands_can_be_parsed(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for argv in commands_of(page):
        recipe = argv[argv.index("--config") + 1] if "--config" in argv else None
        if recipe == "RECIPE.yaml":
            argv[argv.index("--config") :] = []
        if argv == ["--help"]:
            continue
        name = next(name for name in cli.COMMANDS if name.split() == argv[: len(name.split())])
        flags = argv[len(name.split()) :]
        if "--help" in flags or not flags:
            continue  # names the command; its help is tested with the command
        if name == "train" and "--accelerate_config" in flags:
            position = flags.index("--accelerate_config")
            assert (cli.ACCELERATE_CONFIGS / f"{flags[position + 1]}.yaml").is_file(), flags
            del flags[position : position + 2]
        command_parser(name, cli.import_command(name).make_parser).parse_args_and_config(flags)


def test_commands_are_found_on_the_pages():
    """The test above is no better than what it finds."""
    found = {" ".join(argv) for page in PAGES for argv in commands_of(page)}
    assert "train --config recipes/easy_vqa/train.yaml" in found
    assert "bench executor" in found
    assert any(command.startswith("train --results_dir profiling_results") for command in found)


@pages
def test_recipes_exist(page):
    for recipe in re.findall(r"recipes/[\w/]+\.yaml", page.read_text(encoding="utf-8")):
        assert (REPOSITORY / recipe).is_file(), recipe


@pages
def test_python_compiles_and_imports_what_there_is(page):
    for block in code_blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "joint_controller":
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert getattr(module, name.name), name.name


@pages
def test_yaml_can_be_read(page):
    for block in code_blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


def test_readme_is_a_landing_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= MAX_README_WORDS
    assert text[: text.index("```python")].count("\n") < 40
    # `.ci/run` takes the second one from here.
    assert len(code_blocks(README, "bash")) == 2
    assert "\n<!-- tests -->\n```bash\n" in text


def test_the_picture_is_small():
    picture = DOCS / "images" / "accuracy_latency.png"
    assert picture.stat().st_size <= 100_000


def test_citation_is_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)

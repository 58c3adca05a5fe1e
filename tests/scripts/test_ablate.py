"""`joint-controller ablate`: with a stand-in for training, which writes tables that are made up, and with a tiny training."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from PIL import Image
from recorded_world import write_results

from joint_controller.cli import main
from joint_controller.evaluation.request_table import (
    Choices,
    build_request_table,
    read_request_table,
    write_request_table,
)
from joint_controller.evaluation.summary import summarize
from joint_controller.knobs import Knob, KnobSpace
from joint_controller.scripts import ablate
from joint_controller.scripts.train import LOG_FILE, RESULTS_FILE


SPACE = KnobSpace([Knob("size", ("small", "large"), stage=1), Knob("depth", (1, 2, 3), stage=2)])
BUDGETS = (10.0, 20.0)

# A training that takes no time: copies the table of its variant and seed, and writes down how it was called.
STAND_IN = f"""
import json, os, pathlib, shutil, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(flags["--output_dir"])
root = pathlib.Path(os.environ["STAND_IN_ROOT"])
key = folder.parent.name + " " + flags["--seed"]
with open(root / "calls.jsonl", "a") as calls:
    calls.write(json.dumps({{"key": key, **flags}}) + "\\n")
folder.mkdir(parents=True, exist_ok=True)
(folder / {LOG_FILE!r}).write_text('x {{"step": 4, "train_runtime": 12.5}}')
state = root / (key + ".state")
if state.exists():
    kind = state.read_text()
    state.unlink()
    if kind == "interrupted":
        (folder / "checkpoint-2").mkdir()
    if kind != "silent":
        print("line of", key)
        sys.exit(3)
    sys.exit(0)
shutil.copy(root / (key + ".parquet"), folder / "requests.parquet")
(folder / {RESULTS_FILE!r}).write_text("{{}}")
"""


def make_table(policies, seed, budgets=BUDGETS, num_samples=16, generator_seed=0):
    samples = [
        {"sample_id": f"{name}/{number}", "image": f"{name} {number // 2}".encode(), "question_type": "color"}
        for number in range(num_samples // 2)
        for name in ("shapes", "signs")
    ]
    generator = np.random.default_rng([generator_seed, seed])
    choices = [
        Choices(
            policy,
            seed if policy.startswith("controller") else -1,
            budget / 20,
            budget,
            generator.integers(6, size=num_samples),
            generator.random(num_samples),
        )
        for budget in budgets
        for policy in policies
    ]
    world = np.random.default_rng(7)
    accuracy, latency_ms = (
        world.integers(2, size=(num_samples, 6)).astype(float),
        world.uniform(5, 22, (num_samples, 6)),
    )
    return build_request_table(SPACE, samples, choices, accuracy, latency_ms)


POLICIES = ("controller", "controller, no mask", "static", "full")


class World:
    """An ablation of two variants and two seeds, whose trainings are the stand-in."""

    def __init__(self, root: Path):
        self.root, self.out = root, root / "out"
        self.recipe = root / "base.yaml"
        self.recipe.write_text("dataset_names: [scenes]\nseed: 5\nmax_steps: 4\noutput_dir: elsewhere\n")
        self.tables = {}
        for number, variant in enumerate(("base", "slow")):
            for seed in (1, 2):
                self.put(variant, seed, make_table(POLICIES, seed, generator_seed=number))

    def put(self, variant, seed, table):
        self.tables[variant, seed] = table
        write_request_table(table, self.root / f"{variant} {seed}.parquet")

    def fail(self, variant, seed, kind="failed"):
        (self.root / f"{variant} {seed}.state").write_text(kind)

    def config(self, text=None, **changes):
        fields = {
            "recipe": str(self.recipe),
            "output_dir": str(self.out),
            "seeds": [1, 2],
            "variants": {"base": {}, "slow": {"learning_rate": 1e-4}},
            **changes,
        }
        path = self.root / "ablate.yaml"
        path.write_text(yaml.safe_dump(fields, sort_keys=False) if text is None else text)
        return ["ablate", "--config", str(path)]

    def calls(self):
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def world(tmp_path, monkeypatch):
    (tmp_path / "stand_in_training.py").write_text(STAND_IN)
    monkeypatch.setattr(ablate, "TRAIN_MODULE", "stand_in_training")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STAND_IN_ROOT", str(tmp_path))
    return World(tmp_path)


def test_every_variant_is_trained_with_every_seed_and_compared(world, capsys):
    assert main(world.config()) == 0
    calls = world.calls()
    assert [call["key"] for call in calls] == ["base 1", "slow 1", "base 2", "slow 2"]
    for call in calls:
        variant, seed = call["key"].split()
        assert call["--outcomes_dir"] == str(world.out / "outcomes") and "--resume_from_checkpoint" not in call
        assert call["--output_dir"] == str(world.out / variant / f"seed_{seed}")
        recipe = yaml.safe_load(Path(call["--config"]).read_text())
        # Samples are those of the recipe whatever the seed.
        expected = {"data_seed": 5, "dataset_names": ["scenes"], "max_steps": 4}
        assert recipe == (expected if variant == "base" else {**expected, "learning_rate": 1e-4})

    requests = read_request_table(world.out / "requests.parquet")
    assert requests.unique("policy") == ["base", "slow", "static", "full"]
    for variant in ("base", "slow"):
        for seed in (1, 2):
            found = [row for row in requests.to_list() if (row["policy"], row["seed"]) == (variant, seed)]
            expected = [row for row in world.tables[variant, seed].to_list() if row["policy"] == "controller"]
            assert found == [{**row, "policy": variant} for row in expected]
    found = [row for row in requests.to_list() if row["policy"] == "static"]
    assert found == [row for row in world.tables["base", 1].to_list() if row["policy"] == "static"]

    summary = summarize(requests)
    table = Dataset.from_parquet(str(world.out / "ablation.parquet"), cache_dir=str(world.root / "cache"))
    assert table.remove_columns("training_seconds").to_list() == summary.to_list()
    seconds = {"base": 12.5, "slow": 12.5, "static": None, "full": None}
    assert table["training_seconds"] == [seconds[policy] for policy in table["policy"]]
    content = json.loads((world.out / "ablation.json").read_text())
    assert content["rows"] == table.to_list()
    assert {name: value for name, value in content.items() if name != "rows"} == {
        "schema_version": 1,
        "baseline": "static",
        "recipe": str(world.recipe),
        "variants": {"base": {}, "slow": {"learning_rate": 1e-4}},
        "seeds": [1, 2],
        "failed": [],
    }
    assert Image.open(world.out / "accuracy_latency.png").size[0] > 1000
    shown = capsys.readouterr().out
    assert "slow" in shown and "static" in shown and "ablation.md" in shown


def test_the_markdown_table_has_a_line_for_each_variant_and_budget(world):
    assert main(world.config()) == 0
    lines = (world.out / "ablation.md").read_text().splitlines()
    rows = [
        row
        for row in summarize(read_request_table(world.out / "requests.parquet")).to_list()
        if row["dataset"] == "all"
    ]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.count("|") == 10]
    assert [line[0] for line in table[2:]] == ["base", "base", "slow", "slow", "static", "static"]
    for line in table[2:6]:
        row = next(row for row in rows if row["policy"] == line[0] and f"{row['budget_fraction']:.2f}" == line[2])
        assert line[1] == "2" and line[8] == "12.5"
        half_width = (row["accuracy_high"] - row["accuracy_low"]) / 2
        assert line[3] == f"{row['accuracy']:.3f} ± {half_width:.3f}"
        ends = (row["accuracy_difference"], row["accuracy_difference_low"], row["accuracy_difference_high"])
        assert [float(part.strip("[], ")) for part in line[4].split()] == pytest.approx(
            [100 * end for end in ends], abs=0.051
        )
        assert line[6].startswith(f"{100 * row['latency_saved']:.1f} % [")
        assert line[7] == f"{row['violations']:.1%}"
    assert table[6][1] == "-" and table[6][4] == "+0.0 [+0.0, +0.0]" and table[6][8] == "-"
    assert "| slow | `learning_rate: 0.0001` |" in lines and "| base | nothing: the recipe itself |" in lines


def test_finished_runs_are_not_run_again(world):
    assert main(world.config(seeds=[1])) == 0
    before = (world.out / "ablation.md").read_text()
    assert main(world.config(seeds=[1])) == 0
    assert len(world.calls()) == 2 and (world.out / "ablation.md").read_text() == before
    assert main(world.config()) == 0
    assert [call["key"] for call in world.calls()[2:]] == ["base 2", "slow 2"]


def test_a_failed_run_is_told_with_the_end_of_its_log_and_the_others_go_on(world, capsys):
    world.fail("slow", 1)
    world.fail("base", 2, "silent")
    with pytest.raises(SystemExit) as exit_info:
        main(world.config())
    assert exit_info.value.code == 1
    log = world.out / "slow" / "seed_1.log"
    error = capsys.readouterr().err
    assert f"slow, seed 1 ended with exit code 3. The end of {log}:\n" in error and "  line of slow 1\n" in error
    assert "base, seed 2 left no requests.parquet." in error
    assert "joint-controller ablate: 2 of 4 runs failed (slow, seed 1; base, seed 2)." in error
    assert len(world.calls()) == 4
    content = json.loads((world.out / "ablation.json").read_text())
    assert content["failed"] == [{"variant": "slow", "seed": 1}, {"variant": "base", "seed": 2}]
    assert {(row["policy"], row["num_seeds"]) for row in content["rows"]} >= {("base", 1), ("slow", 1)}
    assert "Missing, since they failed: slow, seed 1; base, seed 2." in (world.out / "ablation.md").read_text()

    assert main(world.config()) == 0  # they fail once
    assert [call["key"] for call in world.calls()[4:]] == ["slow 1", "base 2"]
    assert json.loads((world.out / "ablation.json").read_text())["failed"] == []
    # What the first attempt printed is still there.
    assert log.read_text().count("$ ") == 2


def test_a_run_that_had_begun_is_resumed_from_its_checkpoint(world, capsys):
    world.fail("base", 1, "interrupted")
    world.fail("slow", 1)  # before its first checkpoint
    with pytest.raises(SystemExit):
        main(world.config(seeds=[1]))
    (world.out / "slow" / "seed_1" / "left_over").touch()
    assert not (world.out / "ablation.json").exists()  # no run has ended well
    assert main([*world.config(seeds=[1]), "--dry_run", "true"]) == 0
    shown = capsys.readouterr().out
    assert "base, seed 1 (to be resumed):" in shown and "slow, seed 1 (to be run):" in shown
    assert main(world.config(seeds=[1])) == 0
    resumed, anew = world.calls()[2:]
    assert resumed["key"] == "base 1" and resumed["--resume_from_checkpoint"] == "true"
    assert anew["key"] == "slow 1" and "--resume_from_checkpoint" not in anew
    assert not (world.out / "slow" / "seed_1" / "left_over").exists()
    rows = json.loads((world.out / "ablation.json").read_text())["rows"]
    # The log of a resumed run has the seconds of its last part alone.
    assert {row["policy"]: row["training_seconds"] for row in rows if row["dataset"] == "all"} == {
        "base": None,
        "slow": 12.5,
        "static": None,
        "full": None,
    }


def test_a_dry_run_prints_commands_and_writes_nothing(world, capsys):
    assert main([*world.config(), "--dry_run", "true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [f"{variant}, seed {seed} (to be run):" for seed in (1, 2) for variant in ("base", "slow")]
    recipe, folder = world.out / "base" / "recipe.yaml", world.out / "base" / "seed_1"
    assert lines[1] == (
        f"  {sys.executable} -m stand_in_training --config {recipe} --output_dir {folder} --seed 1 --outcomes_dir "
        f"{world.out / 'outcomes'}"
    )
    assert not world.out.exists() and world.calls() == []


def test_variants_can_be_compared_with_a_variant(world):
    assert main(world.config(baseline="base")) == 0
    rows = json.loads((world.out / "ablation.json").read_text())["rows"]
    assert {row["accuracy_difference"] for row in rows if row["policy"] == "base"} == {0.0}
    assert "| static |" not in (world.out / "ablation.md").read_text()


def test_outcomes_of_the_recipe_are_shared_and_recorded_results_need_none(world):
    world.recipe.write_text("dataset_names: [scenes]\noutcomes_dir: known\n")
    assert main(world.config(seeds=[1])) == 0
    assert "--outcomes_dir" not in world.calls()[0]
    assert yaml.safe_load((world.out / "base" / "recipe.yaml").read_text())["outcomes_dir"] == "known"
    world.recipe.write_text("results_dir: recorded\ndevice: cpu\n")
    assert main(world.config(seeds=[1], output_dir=str(world.root / "other"))) == 0
    assert "--outcomes_dir" not in world.calls()[-1]


def test_budgets_that_differ_by_rounding_are_the_same(world):
    world.put("slow", 1, make_table(POLICIES, 1, [budget * (1 + 1e-9) for budget in BUDGETS]))
    assert main(world.config(seeds=[1])) == 0
    assert sorted(read_request_table(world.out / "requests.parquet").unique("latency_budget_ms")) == list(BUDGETS)


# --- what is refused ----------------------------------------------------------------------------------------------


def error_of(capsys, argv):
    capsys.readouterr()
    assert main(argv) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "ablate: error" in line]
    return line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recipe": None}, "field `recipe` in recipe"),
        ({"recipe": ""}, "`recipe` is missing"),
        ({"output_dir": ""}, "`output_dir` is missing"),
        ({"variants": {}}, "`variants` is missing"),
        ({"seeds": []}, "`seeds` is []: give one or more"),
        ({"seeds": [1, 2, 1]}, "`seeds` is [1, 2, 1]: give one or more, each once"),
        ({"seeds": [-1]}, "`seeds` has -1"),
        ({"recipe": "no/such.yaml"}, "'no/such.yaml' does not exist"),
        ({"recipes": "x"}, "unknown field `recipes`"),
        ({"baseline": "best"}, "`baseline` is 'best': choose from full, static"),
        ({"variants": {"base": {"lerning_rate": 1}}}, "variant 'base' of recipe '"),
        ({"variants": {"base": {"lerning_rate": 1}}}, "unknown field `lerning_rate`. Did you mean `learning_rate`?"),
        ({"variants": {"base": {"learning_rate": "fast"}}}, "field `learning_rate` has the value 'fast'"),
        ({"variants": {"base": 3}}, "variant 'base' is 3: give a mapping"),
        ({"variants": {"a": {}, "b": {"max_steps": 4}}}, "variants 'a' and 'b' set the same"),
        ({"variants": {"a": {}, "A": {"max_steps": 5}}}, "`variants` has 'a' and 'A'"),
        ({"variants": {"../a": {}}}, "`variants` has the name '../a'"),
        ({"variants": {3: {}}}, "`variants` has the name 3"),
        ({"variants": {"static": {}}}, "`variants` has the name 'static', which means something else"),
        ({"variants": {"base": {"test_split": "validation"}}}, "variant 'base' sets `test_split`, which must be the same"),
        ({"variants": {"base": {"max_test_samples": 3}}}, "sets `max_test_samples`, which must be the same"),
        ({"variants": {"base": {"sweep_budget_fractions": [1]}}}, "sets `sweep_budget_fractions`, which must be"),
        ({"variants": {"base": {"seed": 3}}}, "sets `seed`, which variants may not set"),
        ({"variants": {"base": {"push_to_hub": True}}}, "sets `push_to_hub`, which variants may not set"),
    ],
)  # fmt: skip
def test_what_would_come_out_wrong_is_refused_before_anything_is_run(world, capsys, changes, expected):
    assert expected in error_of(capsys, world.config(**changes))
    assert not world.out.exists() and world.calls() == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("push_to_hub: true", "has `push_to_hub`, with which all runs would be pushed to one place"),
        ("latency_estimator_path: fit", "has `latency_estimator_path: fit`"),
        ("max_step: 3", "is not a recipe of `joint-controller train`: unknown field `max_step`"),
        ("max_steps: 3\nmax_steps: 4", "`max_steps` is in line 1 and again in line 2"),
    ],
)
def test_recipes_that_cannot_be_varied(world, capsys, text, expected):
    world.recipe.write_text(text)
    assert expected in error_of(capsys, world.config())
    assert not world.out.exists()


def test_two_variants_of_one_name(world, capsys):
    text = f"recipe: {world.recipe}\noutput_dir: {world.out}\nvariants:\n  base: {{}}\n  base: {{max_steps: 5}}\n"
    assert "`base` is in line 4 and again in line 5" in error_of(capsys, world.config(text))


def test_a_folder_of_another_ablation(world, capsys):
    assert main(world.config(seeds=[1])) == 0
    changed = world.config(seeds=[1], variants={"base": {}, "slow": {"learning_rate": 2e-4}})
    message = error_of(capsys, changed)
    assert "holds runs of a variant 'slow' with `learning_rate` 0.0001, now it is 0.0002" in message
    world.out.with_name("file").touch()
    assert "is a file" in error_of(capsys, world.config(output_dir=str(world.out.with_name("file"))))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (make_table(POLICIES, 1, num_samples=12), "have 12 and 16 samples, of which 12 are in both"),
        (make_table(POLICIES, 1, budgets=(10.0, 21.0)), "have budgets of 10.000, 21.000 ms and of 10.000, 20.000 ms"),
        (make_table(POLICIES, 1, budgets=(10.0,)), "have budgets of 10.000 ms and of 10.000, 20.000 ms"),
        (make_table(("static",), 1), "has no policy 'controller'"),
        (make_table(POLICIES, 1).rename_column("depth", "width"), "have 2 and 2 knobs, of which 1 are in both"),
    ],
)
def test_runs_that_cannot_be_compared_stop_the_ablation(world, capsys, table, expected):
    world.put("slow", 1, table)
    assert expected in error_of(capsys, world.config())
    assert [call["key"] for call in world.calls()] == ["base 1", "slow 1"]
    assert not (world.out / "ablation.json").exists()


def test_a_baseline_that_tables_do_not_have(world, capsys):
    message = error_of(capsys, world.config(baseline="ceiling"))
    assert "`baseline` is 'ceiling', but" in message and "controller, no mask, static, full" in message
    assert len(world.calls()) == 1


# --- with a training ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_ablation_of_trainings_on_recorded_results(tmp_path):
    """Processes as users have them, from the command line to the table."""
    recipe, config = tmp_path / "train.yaml", tmp_path / "ablate.yaml"
    fields = {
        "results_dir": str(write_results(tmp_path / "results", num_samples=24)),
        "dataset_names": ["text_vqa", "coco_2014_vqa"],
        "device": "cpu",
        "batch_size": 8,
        "num_epochs": 2,
    }
    recipe.write_text(yaml.safe_dump(fields))
    out = tmp_path / "out"
    variants = {"fast": {"lr": 1e-2}}
    fields = {"recipe": str(recipe), "output_dir": str(out), "seeds": [1, 2], "variants": variants}
    config.write_text(yaml.safe_dump(fields))
    assert main(["ablate", "--config", str(config)]) == 0
    rows = [row for row in json.loads((out / "ablation.json").read_text())["rows"] if row["dataset"] == "all"]
    assert {"fast", "static", "full"} <= {row["policy"] for row in rows}
    trained = [row for row in rows if row["policy"] == "fast"]
    assert {row["num_seeds"] for row in trained} == {2} and all(row["training_seconds"] > 0 for row in trained)
    for seed in (1, 2):
        own = read_request_table(out / "fast" / f"seed_{seed}" / "requests.parquet")
        assert {row["seed"] for row in own.to_list() if row["policy"] == "controller"} == {seed}
    requests = read_request_table(out / "requests.parquet")
    assert {row["seed"] for row in requests.to_list() if row["policy"] == "fast"} == {1, 2}
    # A line for each budget, and one that says what the variant is.
    assert (out / "ablation.md").read_text().count("| fast |") == 1 + len(requests.unique("latency_budget_ms"))

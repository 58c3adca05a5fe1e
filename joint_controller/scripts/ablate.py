"""
Trains variants of a recipe with several seeds, and compares them in one table.

```bash
joint-controller ablate --config recipes/easy_vqa/ablate.yaml
```
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers.hf_argparser import HfArg

from . import ScriptParser, run_script


if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset


TRAIN_MODULE = "joint_controller.scripts.train"
"""Module that a run is a process of."""

TABLE_FILE = "ablation.parquet"
JSON_FILE = "ablation.json"
MARKDOWN_FILE = "ablation.md"

SCHEMA_VERSION = 1
"""Version of the schema of `ablation.json`."""

RECIPE_FILE = "recipe.yaml"
"""Recipe of a variant, in its folder."""

TRAINED_POLICY = "controller"
"""Policy of a run's request table that is named after the variant."""

_LOG_LINES = 12  # of a failed run that are shown
_SAME_BUDGET = 1e-6  # relative; means over the same samples in another order differ by rounding

# Fields that say what is tested and what counts as a millisecond: variants that differ in them cannot be compared.
_SAME_IN_ALL = (
    *("dataset_names", "dataset_weights", "test_split", "max_test_samples", "data_seed", "skip_bad_rows"),
    *("sweep_budget_fractions", "results_dir", "image_dir", "model_path", "importance_path", "max_new_tokens"),
    *("latency_estimator_path", "latency_scope"),
)
# Fields that differ from run to run anyway.
_SET_HERE = ("output_dir", "outcomes_dir", "seed", "resume_from_checkpoint", "env")


@dataclass
class AblateArguments:
    """Arguments of `joint-controller ablate`."""

    recipe: str = HfArg(
        default="", help="Recipe of `joint-controller train` (YAML) that variants are variants of. Required."
    )
    output_dir: str = HfArg(
        default="",
        help="Folder for runs and tables: a run goes to VARIANT/seed_N, and what it prints to VARIANT/seed_N.log. The same "
        "command goes on where it was stopped: finished runs are kept, one that had begun is resumed, failed ones are run "
        "again. Required.",
    )
    variants: dict | None = HfArg(
        default=None,
        help="In a recipe only: fields of `joint-controller train` that each variant sets, by its name, e.g. `{base: {}, slow: "
        "{learning_rate: 1e-4}}`; one that sets none is the recipe itself. Data, executor, latencies and the budgets of the "
        "table must be the same in all. Required.",
    )
    seeds: list[int] = HfArg(
        default_factory=lambda: [1, 2, 3],
        help="Seeds of the trainings. Samples are drawn by the recipe's `data_seed`, or else by its `seed`, in all runs.",
    )
    baseline: str = HfArg(
        default="static",
        help="What accuracies and latencies are compared with: a policy that is not trained, or a variant.",
    )
    dry_run: bool = HfArg(default=False, help="Check everything, print what would be run, and stop.")


@dataclass(frozen=True)
class Run:
    """
    One training.

    Args:
        variant (`str`):
            Name of the variant.
        seed (`int`):
            Seed of the training.
        folder (`Path`):
            Output folder; the log is beside it.
        flags (`tuple[str, ...]`):
            Flags of `joint-controller train`, without `--resume_from_checkpoint`.
    """

    variant: str
    seed: int
    folder: Path
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    @property
    def log_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def requests_file(self) -> Path:
        from ..evaluation.request_table import REQUESTS_FILE

        return self.folder / REQUESTS_FILE

    @property
    def is_done(self) -> bool:
        return self.requests_file.is_file()

    @property
    def can_be_resumed(self) -> bool:
        return any(self.folder.glob("checkpoint-*"))

    @property
    def command(self) -> list[str]:
        resume = ["--resume_from_checkpoint", "true"] if self.can_be_resumed else []
        return [sys.executable, "-m", TRAIN_MODULE, *self.flags, *resume]


def main(args: AblateArguments):
    from rich.console import Console
    from tqdm.auto import tqdm

    from ..evaluation.request_table import read_request_table

    recipes = make_recipes(args)
    runs = plan_runs(args, recipes)
    if args.dry_run:
        for run in runs:
            state = "done" if run.is_done else "to be resumed" if run.can_be_resumed else "to be run"
            print(f"{run.name} ({state}):\n  {shlex.join(run.command)}")
        return
    write_recipes(args, recipes)
    console = Console()
    tables: dict[Run, Dataset] = {}
    failed: list[Run] = []
    first: Run | None = None
    with tqdm(runs, desc="Runs", unit="run", disable=None, delay=0) as bar:
        for run in bar:
            bar.set_postfix_str(run.name)
            if not run.is_done:
                if bar.disable:  # not a terminal
                    print(f"{run.name}: see {run.log_file}", flush=True)
                code = execute(run)
                if code != 0 or not run.is_done:
                    failed.append(run)
                    bar.write(describe_failure(run, code), file=sys.stderr)
                    continue
            tables[run] = read_request_table(run.requests_file)
            first = first or run
            # At once, so that hours are not spent on runs that cannot be compared.
            check_comparable(run, tables[run], first, tables[first], args.baseline, recipes)
    if tables:
        report(args, recipes, tables, failed, console)
    if failed:
        names = "; ".join(run.name for run in failed)
        print(
            f"joint-controller ablate: {len(failed)} of {len(runs)} runs failed ({names}). The same command runs them again.",
            file=sys.stderr,
        )
        sys.exit(1)


# --- what is to be run ----------------------------------------------------------------------------------------------


def make_recipes(args: AblateArguments) -> dict[str, dict[str, Any]]:
    """
    Recipes of the variants, by their names.

    Args:
        args ([`AblateArguments`]):
            The arguments.

    Returns:
        `dict[str, dict]`: fields of each variant, those of the recipe included.

    Raises:
        FileNotFoundError: If the recipe does not exist.
        ValueError: If an argument is missing, a variant has a field that training does not know or that variants may not set,
            a value that it refuses, or is the same as another one.
    """
    for name in ("recipe", "output_dir", "variants"):
        if not getattr(args, name):
            raise ValueError(f"`{name}` is missing.")
    if not args.seeds or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"`seeds` is {args.seeds}: give one or more, each once.")
    for seed in args.seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"`seeds` has {seed}: seeds are whole numbers from 0 to {2**32 - 1}.")
    base = _read_base(args.recipe)
    _check_names(args)
    recipes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, fields in args.variants.items():
            fields = {} if fields is None else fields
            if not isinstance(fields, dict):
                raise ValueError(
                    f"variant '{name}' is {fields!r}: give a mapping of fields to values, `{{}}` for the recipe itself."
                )
            _check_fields(name, fields)
            recipe = {**base, **fields}
            twin = next((other for other, known in recipes.items() if known == recipe), None)
            if twin is not None:
                raise ValueError(f"variants '{twin}' and '{name}' set the same: leave one out.")
            _check_recipe(name, recipe, Path(folder) / "variant.yaml", args)
            recipes[name] = recipe
    return recipes


def _read_base(path: str) -> dict[str, Any]:
    from .train import make_parser

    # The parser of the training refuses what it would refuse: unknown fields, keys that occur twice.
    try:
        make_parser().parse_args_and_config(["--config", path, "--output_dir", "any"])
    except ValueError as error:
        raise ValueError(f"`recipe` '{path}' is not a recipe of `joint-controller train`: {error}") from error
    base = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if base.get("push_to_hub"):
        raise ValueError(
            f"recipe '{path}' has `push_to_hub`, with which all runs would be pushed to one place: leave it out."
        )
    if base.get("latency_estimator_path") == "fit":
        raise ValueError(
            f"recipe '{path}' has `latency_estimator_path: fit`, with which each run would measure milliseconds of its own: fit "
            "an estimator first (`joint-controller fit-latency`), and give its folder."
        )
    base = {name: value for name, value in base.items() if name not in ("output_dir", "resume_from_checkpoint")}
    # Else each seed would draw other samples, and runs could not be compared.
    return {"data_seed": base.pop("seed", 42), **base}


def _check_names(args: AblateArguments) -> None:
    from ..evaluation.sweep import BASELINES

    folders: dict[str, str] = {}
    for name in args.variants:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w .,+=-]*", name) or name.endswith((" ", ".")):
            raise ValueError(
                f"`variants` has the name {name!r}, which cannot be that of a folder: use letters, digits, spaces and `_.,+=-`, "
                "the first a letter or a digit, and quote numbers."
            )
        if name in BASELINES or name == "outcomes":
            raise ValueError(f"`variants` has the name '{name}', which means something else: choose another one.")
        if name.lower() in folders:
            raise ValueError(
                f"`variants` has '{folders[name.lower()]}' and '{name}', which some disks take for one folder: rename one."
            )
        folders[name.lower()] = name
    if args.baseline not in (*args.variants, *BASELINES):
        known = ", ".join((*BASELINES, *args.variants))
        raise ValueError(f"`baseline` is '{args.baseline}': choose from {known}.")


def _check_fields(variant: str, fields: Mapping[str, Any]) -> None:
    for name in fields:
        if name in _SAME_IN_ALL:
            raise ValueError(
                f"variant '{variant}' sets `{name}`, which must be the same in all variants, else they could not be compared: "
                "set it in the recipe, or make an ablation of its own for it."
            )
        if name in _SET_HERE or name.startswith("hub_") or name == "push_to_hub":
            raise ValueError(f"variant '{variant}' sets `{name}`, which variants may not set: leave it out.")


def _check_recipe(variant: str, recipe: Mapping[str, Any], file: Path, args: AblateArguments) -> None:
    """Lets the parser of the training read the recipe of a variant, without `env`, which it would set here."""
    from .train import make_parser

    fields = {name: value for name, value in recipe.items() if name != "env"}
    file.write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")
    run = make_run(variant, args.seeds[0], recipe, file, Path(args.output_dir))
    try:
        make_parser().parse_args_and_config(list(run.flags))
    except ValueError as error:
        told = str(error).replace(f" in recipe '{file}'", "")
        raise ValueError(f"variant '{variant}' of recipe '{args.recipe}': {told}") from error


def make_run(variant: str, seed: int, recipe: Mapping[str, Any], recipe_file: Path, output_dir: Path) -> Run:
    """
    The training of a variant with a seed.

    Args:
        variant (`str`), seed (`int`), recipe (`Mapping`):
            The variant's name, the seed and the variant's fields.
        recipe_file (`Path`):
            Where the fields are written.
        output_dir (`Path`):
            Folder of the ablation.
    """
    folder = output_dir / variant / f"seed_{seed}"
    flags = ["--config", str(recipe_file), "--output_dir", str(folder), "--seed", str(seed)]
    # What was recorded before needs no folder. One that the recipe names is shared as well.
    if "results_dir" not in recipe and "outcomes_dir" not in recipe:
        flags += ["--outcomes_dir", str(output_dir / "outcomes")]
    return Run(variant, seed, folder, tuple(flags))


def plan_runs(args: AblateArguments, recipes: Mapping[str, Mapping[str, Any]]) -> list[Run]:
    """
    All runs: seed by seed, so that an ablation that is stopped early has compared something.

    Args:
        args ([`AblateArguments`]):
            The arguments.
        recipes (`Mapping[str, Mapping]`):
            What [`make_recipes`] gives.

    Returns:
        `list[Run]`

    Raises:
        ValueError: If the output folder holds another ablation.
    """
    output_dir = Path(args.output_dir)
    if output_dir.is_file():
        raise ValueError(f"`output_dir` '{output_dir}' is a file: name a folder.")
    for name, recipe in recipes.items():
        file = output_dir / name / RECIPE_FILE
        if not file.is_file():
            continue
        begun = yaml.safe_load(file.read_text(encoding="utf-8"))
        changed = [field for field in {**begun, **recipe} if begun.get(field) != recipe.get(field)]
        if changed:
            raise ValueError(
                f"`output_dir` '{output_dir}' holds runs of a variant '{name}' with `{changed[0]}` {begun.get(changed[0])}, now it "
                f"is {recipe.get(changed[0])}: rename the variant, name another `output_dir`, or delete '{file.parent}'."
            )
    return [
        make_run(name, seed, recipe, output_dir / name / RECIPE_FILE, output_dir)
        for seed in args.seeds
        for name, recipe in recipes.items()
    ]


def write_recipes(args: AblateArguments, recipes: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the recipe of each variant into its folder, for its runs and for whoever wants to repeat one."""
    for name, recipe in recipes.items():
        file = Path(args.output_dir) / name / RECIPE_FILE
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f"{file.name}.tmp")
            text = yaml.safe_dump(dict(recipe), allow_unicode=True, sort_keys=False)
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(file)


# --- running --------------------------------------------------------------------------------------------------------


def execute(run: Run) -> int:
    """
    Runs a training in a process of its own, which leaves nothing behind for the next: what it prints goes to the log file.

    Args:
        run ([`Run`]):
            The run. If it had begun it is resumed, or, without a checkpoint, begun anew.

    Returns:
        `int`: its exit code.
    """
    from .train import LOG_FILE

    if not run.can_be_resumed and (run.folder / LOG_FILE).exists():
        shutil.rmtree(run.folder)  # training refuses a folder of another run; outcomes are elsewhere
    run.log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log_file, "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(run.command)}\n")
        log.flush()
        return subprocess.run(run.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT).returncode


def describe_failure(run: Run, code: int) -> str:
    """What is said of a run that failed: its exit code, its log, and the last lines of that."""
    reason = f"ended with exit code {code}" if code else f"left no {run.requests_file.name}"
    lines = run.log_file.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_LOG_LINES:]
    shown = "\n".join(f"  {line}" for line in lines)
    return f"{run.name} {reason}. The end of {run.log_file}:\n{shown}"


def training_seconds(run: Run) -> float | None:
    """
    How long a run trained, by its results or else its log.

    Args:
        run ([`Run`]):
            A finished run.

    Returns:
        `float` or `None`: seconds; `None` where they are not known, or were spent in several processes.
    """
    from .train import LOG_FILE, RESULTS_FILE

    if run.log_file.is_file() and "--resume_from_checkpoint" in run.log_file.read_text(
        encoding="utf-8", errors="replace"
    ):
        return None
    results_file, log_file = run.folder / RESULTS_FILE, run.folder / LOG_FILE
    if results_file.is_file():
        seconds = json.loads(results_file.read_text(encoding="utf-8")).get("train_runtime")
        if seconds is not None:
            return float(seconds)
    if log_file.is_file():
        found = re.findall(r'"train_runtime": ([\d.]+)', log_file.read_text(encoding="utf-8", errors="replace"))
        if found:
            return float(found[-1])
    return None


# --- comparing ------------------------------------------------------------------------------------------------------


def check_comparable(
    run: Run,
    requests: "Dataset",
    first: Run,
    of_first: "Dataset",
    baseline: str,
    variants: Mapping[str, Any],
) -> None:
    """
    Refuses a run that cannot be compared with the first one.

    Args:
        run ([`Run`]), requests (`datasets.Dataset`):
            The run and its request table.
        first ([`Run`]), of_first (`datasets.Dataset`):
            The first run and its request table.
        baseline (`str`), variants (`Mapping`):
            What is compared with: a policy of the first run's table, or one of the variants.

    Raises:
        ValueError: If it has no controller, or other samples, budgets or knobs than the first one, or there is no baseline.
    """
    from ..evaluation.request_table import knob_columns

    policies = requests.unique("policy")
    if TRAINED_POLICY not in policies:
        raise ValueError(
            f"'{run.requests_file}' has no policy '{TRAINED_POLICY}': delete '{run.folder}' to run it again."
        )
    if run is first:
        if baseline not in policies and baseline not in variants:
            raise ValueError(
                f"`baseline` is '{baseline}', but '{run.requests_file}' has {', '.join(policies)}: choose one of these."
            )
        return
    files = f"'{run.requests_file}' and '{first.requests_file}'"
    for what, ours, others in (
        ("samples", set(requests.unique("sample_id")), set(of_first.unique("sample_id"))),
        ("knobs", set(knob_columns(requests)), set(knob_columns(of_first))),
    ):
        if ours != others:
            raise ValueError(
                f"runs cannot be compared: {files} have {len(ours)} and {len(others)} {what}, of which {len(ours & others)} are in "
                "both. Variants may not change what is tested."
            )
    ours, others = (sorted(table.unique("latency_budget_ms")) for table in (requests, of_first))
    if len(ours) != len(others) or any(
        abs(one - other) > _SAME_BUDGET * other for one, other in zip(ours, others, strict=False)
    ):
        shown = (", ".join(f"{one:.3f}" for one in budgets) for budgets in (ours, others))
        raise ValueError(
            f"runs cannot be compared: {files} have budgets of {next(shown)} ms and of {next(shown)} ms. They follow from the "
            "training samples and the knobs' largest values, which must be the same in all variants."
        )


def join_tables(tables: "Mapping[Run, Dataset]") -> "Dataset":
    """
    One request table of all runs: the controllers', under the names of their variants, and all that is not trained, of the
    first run.

    Args:
        tables (`Mapping[Run, datasets.Dataset]`):
            Request tables that can be compared, by run.

    Returns:
        `datasets.Dataset`: a request table.
    """
    import pyarrow
    import pyarrow.compute
    from datasets import Dataset

    from ..evaluation.request_table import NOT_TRAINED, arrow_table

    parts: list[pyarrow.Table] = []
    of_first = arrow_table(next(iter(tables.values())))
    for run, requests in tables.items():
        table = arrow_table(requests)
        table = table.filter(pyarrow.compute.equal(table["policy"], TRAINED_POLICY))
        parts.append(_with_budgets_of(of_first, _renamed(table, run)).select(of_first.column_names))
    parts.append(of_first.filter(pyarrow.compute.equal(of_first["seed"], NOT_TRAINED)))
    return Dataset(pyarrow.concat_tables(parts).combine_chunks())


def _renamed(table: "pyarrow.Table", run: Run) -> "pyarrow.Table":
    import pyarrow

    for name, value in (("policy", run.variant), ("seed", run.seed)):
        field = table.schema.field(name)
        column = pyarrow.repeat(pyarrow.scalar(value, field.type), len(table))
        table = table.set_column(table.column_names.index(name), field, column)
    return table


def _with_budgets_of(of_first: "pyarrow.Table", table: "pyarrow.Table") -> "pyarrow.Table":
    """Budgets of the first run, of which the others' differ by rounding."""
    import numpy as np
    import pyarrow

    known, rows = np.unique(of_first["latency_budget_ms"].to_numpy(), return_index=True)
    ours = table["latency_budget_ms"].to_numpy()
    nearest = np.abs(ours[:, None] - known).argmin(axis=1)
    for name in ("latency_budget_ms", "budget_fraction"):
        values = of_first[name].to_numpy()[rows][nearest]
        column = pyarrow.array(values, type=pyarrow.float64())
        table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    return table


def report(
    args: AblateArguments,
    recipes: Mapping[str, Mapping[str, Any]],
    tables: "Mapping[Run, Dataset]",
    failed: Sequence[Run],
    console: Any,
) -> None:
    """Writes and shows the tables and the picture of the runs that there are."""
    from datasets import Value

    from ..evaluation.plots import SWEEP_PICTURE_FILE, draw_accuracy_latency, save_picture
    from ..evaluation.request_table import REQUESTS_FILE, write_request_table
    from ..evaluation.summary import format_summary_table, rows_of, summarize

    output_dir = Path(args.output_dir)
    requests = join_tables(tables)
    if args.baseline not in requests.unique("policy"):
        raise ValueError(
            f"`baseline` is '{args.baseline}', of which no run has ended well: repair it, or choose another one."
        )
    summary = summarize(requests, args.baseline)
    seconds_of = {run: training_seconds(run) for run in tables}
    seconds = {}
    for variant in recipes:
        known = [value for run, value in seconds_of.items() if run.variant == variant and value is not None]
        seconds[variant] = sum(known) / len(known) if known else None
    column = [seconds.get(policy) for policy in summary["policy"]]
    with_seconds = summary.add_column("training_seconds", column, feature=Value("float64"))
    shown = [name for name in recipes if name in summary["policy"]]
    if args.baseline not in shown:
        shown.append(args.baseline)

    files = [write_request_table(requests, output_dir / REQUESTS_FILE)]
    files += [output_dir / name for name in (TABLE_FILE, JSON_FILE, MARKDOWN_FILE)]
    with_seconds.to_parquet(files[1])
    content = {
        "schema_version": SCHEMA_VERSION,
        "baseline": args.baseline,
        "recipe": args.recipe,
        "variants": dict(args.variants),
        "seeds": list(args.seeds),
        "failed": [{"variant": run.variant, "seed": run.seed} for run in failed],
        "rows": with_seconds.to_list(),
    }
    files[2].write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    files[3].write_text(format_markdown(args, with_seconds, shown, failed), encoding="utf-8")
    of_shown = summary.select([row for row, policy in enumerate(summary["policy"]) if policy in shown])
    files.append(save_picture(draw_accuracy_latency(of_shown), output_dir / SWEEP_PICTURE_FILE))
    size = rows_of(summary)[0]["num_samples"]
    console.print(format_summary_table(summary, f"{size} samples; compared with {args.baseline}", shown))
    names = ", ".join(file.name for file in files)
    console.print(f"In {output_dir}: {names}.", highlight=False, soft_wrap=True)


def format_markdown(
    args: AblateArguments, summary: "Dataset", shown: Sequence[str], failed: Sequence[Run] = ()
) -> str:
    """
    The table of an ablation, a line for each variant and budget, and what the variants are.

    Args:
        args ([`AblateArguments`]):
            The arguments.
        summary (`datasets.Dataset`):
            A summary with the column `training_seconds`.
        shown (`Sequence[str]`):
            Variants and other policies to show, in order.
        failed (`Sequence[Run]`):
            Runs that are missing.

    Returns:
        `str`: Markdown.
    """
    from ..evaluation.summary import rows_of

    rows = rows_of(summary, policies=shown)
    lines = [
        f"# Ablation of {Path(args.recipe).as_posix()}",
        "",
        f"{rows[0]['num_samples']} questions about {rows[0]['num_images']} images; mean over seeds ± half of the 95 % interval "
        f"over images. Differences and savings are from `{args.baseline}`, paired, with 95 % intervals.",
        "",
        "| variant | seeds | budget (of full) | accuracy | difference (points) | latency (ms) | latency saved | violations | "
        "training (s) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: (shown.index(row["policy"]), row["latency_budget_ms"])):
        half_width = (row["accuracy_high"] - row["accuracy_low"]) / 2
        seconds = row["training_seconds"]
        lines.append(
            f"| {row['policy']} | {row['num_seeds'] if row['policy'] in args.variants else '-'} | {row['budget_fraction']:.2f} | "
            f"{row['accuracy']:.3f} ± {half_width:.3f} | {_with_interval(row, 'accuracy_difference', '+.1f')} | "
            f"{row['latency_ms']:.1f} | {_with_interval(row, 'latency_saved', '.1f', ' %')} | {row['violations']:.1%} | "
            f"{'-' if seconds is None else f'{seconds:.1f}'} |"
        )
    lines += ["", "| variant | sets |", "| --- | --- |"]
    for name, fields in args.variants.items():
        sets = ", ".join(f"`{field}: {json.dumps(value)}`" for field, value in (fields or {}).items())
        lines.append(f"| {name} | {sets or 'nothing: the recipe itself'} |")
    if failed:
        lines += ["", f"Missing, since they failed: {'; '.join(run.name for run in failed)}."]
    return "\n".join(lines) + "\n"


def _with_interval(row: Mapping[str, Any], name: str, form: str, unit: str = "") -> str:
    """A share in percent or points with its interval, e.g. `+1.2 [+0.3, +2.1]`."""
    if row[name] is None:
        return "-"
    # Rounded first, so that nothing is shown as -0.0.
    value, low, high = (format(round(100 * row[f"{name}{end}"], 1) + 0.0, form) for end in ("", "_low", "_high"))
    return f"{value}{unit} [{low}, {high}]"


def make_parser() -> ScriptParser:
    return ScriptParser((AblateArguments,))


if __name__ == "__main__":
    sys.exit(run_script("ablate", make_parser, main))

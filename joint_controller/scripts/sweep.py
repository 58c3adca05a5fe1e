"""
Evaluates trained controllers over latency budgets, compared with policies that are not trained.

```bash
joint-controller sweep --controller_path outputs/easy_vqa --output_dir outputs/sweep
```

or, on several devices:

```bash
accelerate launch -m joint_controller.scripts.sweep --controller_path outputs/easy_vqa --output_dir outputs/sweep
```
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.hf_argparser import HfArg

from . import ScriptParser, run_script
from .data_arguments import DatasetArguments, load_split, open_skipped_rows
from .executor_arguments import FIT, ExecutorArguments, load_executor_from, load_latency_estimator


if TYPE_CHECKING:
    from datasets import Dataset

    from ..controller import JointControllerModel
    from ..data import Sample
    from ..evaluation.policies import Policy
    from ..executor import Executor
    from ..latency import Guardrail, LatencyEstimator
    from ..rewards import RewardFunction


STATIC_SPLIT = "train"
"""Split that policies which are not trained are chosen on."""

CONTROLLER = "controller"
NO_MASK = ", no mask"
"""What follows the name of a controller that may choose settings which do not fit."""

CONTROLLERS = (CONTROLLER, CONTROLLER + NO_MASK)
"""Values of `policies` that stand for the trained controllers, whatever their names."""

ARGUMENTS_FILE = "sweep_arguments.json"
"""File in the output folder that says what its tables are of."""

# What a run may change when it goes on: where outcomes come from and how fast, not what they are.
_NOT_RECORDED = {
    "controller_path",
    "output_dir",
    "outcomes_dir",
    "known_outcomes",
    "executor_batch_size",
    "executor_workers",
    "num_threads",
}


@dataclass
class SweepArguments(ExecutorArguments, DatasetArguments):
    """
    Arguments of `joint-controller sweep`. Knobs are the controllers'.
    """

    controller_path: list[str] = HfArg(
        default_factory=list,
        help="Folders or Hub names of one or more controllers with the same knobs, each plain or as `name=path`, the name in "
        "tables (default: controller). Several of one name are trainings with other seeds, and are summarised together. "
        "Required.",
    )
    output_dir: str = HfArg(
        default="",
        help="Folder for the tables and pictures. A run that was interrupted goes on there, with the same arguments. Required.",
    )
    policies: list[str] | None = HfArg(
        default=None,
        help="Policies to evaluate: `controller`, `controller, no mask` (each for all names of controllers), `full`, `static`, "
        "`static by reward`, `fits`, `look-up`, `per question type`, `random`, `ceiling`. The ceiling answers every sample "
        "at every setting. Default: all but the ceiling.",
    )
    dataset_split: str = HfArg(default="test", help="Split that is evaluated.")
    max_samples: int | None = HfArg(default=None, help="Samples in all. Default: all.")
    max_static_samples: int = HfArg(
        default=256,
        help="Training samples that are answered at every setting: static settings and the other policies that are not trained "
        "are chosen on them.",
    )
    outcomes_dir: str | None = HfArg(
        default=None,
        help="Folder of executor outcomes, e.g. that of the training; what it holds is not run again. Default: `outcomes` "
        "in the output folder.",
    )
    known_outcomes: list[str] | None = HfArg(
        default=None,
        help="Further folders of executor outcomes that are looked up but not written to, or names of those that ship, as in "
        "`joint-controller train`.",
    )
    reward_funcs: list[str] | None = HfArg(
        default=None,
        help="Reward functions, as in `joint-controller train`. Default: those that the first controller was trained for.",
    )
    reward_weights: list[float] | None = HfArg(
        default=None,
        help="Weight of each reward function. Default: those that the first controller was trained for.",
    )
    budgets_ms: list[float] | None = HfArg(
        default=None, help="Budgets, in ms. Default: fractions of the full setting's latency."
    )
    budget_fractions: list[float] = HfArg(
        default_factory=lambda: [0.35, 0.5, 0.7, 0.85, 1.0],
        help="Budgets as fractions of the full setting's latency, where none are given in ms.",
    )
    guardrail_quantile: float = HfArg(
        default=0.5,
        help="A setting fits a request if its latency is predicted to stay below the budget on this share of requests (0.5, as "
        "`static` is chosen, or 0.9, 0.95 or 0.99), with an answer of `max_new_tokens`: controllers choose among these, except `controller, no mask`. "
        "0 predicts nothing, and leaves out the policies that need it.",
    )
    measure: bool = HfArg(
        default=False,
        help="Answer the requests of controllers and of `static` one at a time, too, and measure what they and the decisions "
        "take by the clock. To be done on a machine that is not busy with something else, in one process.",
    )
    seed: int = HfArg(default=42, help="Seed of the samples and of the random settings.")

    def __post_init__(self):
        for name in ("budgets_ms", "budget_fractions"):
            budgets = getattr(self, name)
            if budgets is not None and not (budgets and all(0 < budget < math.inf for budget in budgets)):
                raise ValueError(f"`{name}` is {budgets}: give one or more finite numbers above 0.")
            if budgets is not None and len(set(budgets)) < len(budgets):
                raise ValueError(f"`{name}` is {budgets}: give each budget once.")
        if self.max_static_samples < 1:
            raise ValueError(f"`max_static_samples` is {self.max_static_samples}: give 1 or more.")
        if self.policies is not None and (not self.policies or len(set(self.policies)) < len(self.policies)):
            raise ValueError(f"`policies` is {self.policies}: name one or more, each once.")


@dataclass(frozen=True)
class Trained:
    """A controller of a sweep: its name in tables, the seed that it was trained with, its folder, and itself."""

    name: str
    seed: int
    folder: Path
    controller: "JointControllerModel"


def main(args: SweepArguments):
    from accelerate import PartialState
    from rich.console import Console

    from ..data import SplitPart
    from ..evaluation.plots import plot_sweep_pictures
    from ..evaluation.request_table import REQUESTS_FILE, read_request_table
    from ..evaluation.summary import (
        STATIC,
        SWEEP_MARKDOWN_FILE,
        format_summary_markdown,
        format_summary_table,
        summarize,
        write_summary,
    )
    from ..evaluation.sweep import BASELINES, NEED_FORECAST
    from ..latency.latency_estimator import SCOPE_IN_WORDS

    for name in ("controller_path", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"`--{name}` is missing.")
    if args.latency_estimator_path == FIT:
        raise ValueError(
            "a sweep takes the latency estimator that the controller was trained with: leave `latency_estimator_path` out, or "
            "give the folder of another one."
        )
    if SplitPart.parse(args.dataset_split).overlaps(SplitPart.parse(STATIC_SPLIT)):
        raise ValueError(
            f"`dataset_split` is '{args.dataset_split}', but static settings are chosen on '{STATIC_SPLIT}': evaluate on other "
            "samples."
        )
    needs_mask = (CONTROLLER, *NEED_FORECAST)
    if args.policies is None:
        args.policies = [
            name
            for name in (*CONTROLLERS, *BASELINES)
            if name != "ceiling" and (args.guardrail_quantile or name not in needs_mask)
        ]
    for name in args.policies:
        if name not in (*CONTROLLERS, *BASELINES):
            known = ", ".join(map(repr, (*CONTROLLERS, *BASELINES)))
            raise ValueError(f"`policies` has '{name}': choose from {known}.")
        if name in needs_mask and not args.guardrail_quantile:
            raise ValueError(
                f"`policies` has '{name}', which has to know what fits, but `guardrail_quantile` is 0: give a quantile, or leave "
                "the policy out."
            )
    # On several devices, it says which is that of this process.
    state = PartialState()
    if args.measure and state.num_processes > 1:
        raise ValueError(
            f"`measure` needs a machine that does nothing else, but there are {state.num_processes} processes: run `joint-"
            "controller sweep` in one."
        )
    trained = load_trained(args.controller_path)
    resolve_estimator(args, trained)
    output_dir = Path(args.output_dir)
    begin_run(output_dir, args, trained)
    requests_file = output_dir / REQUESTS_FILE
    console = Console()
    samples = None
    if requests_file.exists():
        requests = read_request_table(requests_file)
        if state.is_main_process:
            console.print(f"{requests_file} is there already: nothing is answered again.", soft_wrap=True)
    else:
        requests, samples = make_requests(args, trained, requests_file, console)
    if not state.is_main_process:
        return
    baseline = STATIC if STATIC in args.policies else None
    summary = summarize(requests, baseline)
    files = [requests_file, *write_summary(summary, output_dir, baseline)]
    num_samples = len(set(requests["sample_id"]))
    of = f"{num_samples} samples of {', '.join(args.dataset_names)}; latencies of {SCOPE_IN_WORDS[args.latency_scope]}"
    sections = [f"# Policies by latency budget\n\n{of[0].upper()}{of[1:]}."]
    sections += [
        f"## {'All data sets' if name == 'all' else name}\n\n{format_summary_markdown(summary, dataset=name)}"
        for name in dict.fromkeys(summary["dataset"])
    ]
    files.append(output_dir / SWEEP_MARKDOWN_FILE)
    files[-1].write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    files += plot_sweep_pictures(requests, output_dir, samples)
    console.print(format_summary_table(summary, of))
    console.print("Accuracy ± half of its 95 % interval; saved: of the mean latency of `static`.", highlight=False)
    names = ", ".join(str(Path(file).relative_to(output_dir)) for file in files)
    console.print(f"In {output_dir}: {names}.", highlight=False, soft_wrap=True)


def load_trained(controller_paths: Sequence[str]) -> list[Trained]:
    """
    Loads the controllers that `--controller_path` names, and refuses those that cannot be compared.

    Args:
        controller_paths (`Sequence[str]`):
            A path each, or `name=path`.

    Raises:
        FileNotFoundError: If there is none in a path.
        ValueError: If a name cannot be used, knob spaces differ, or two have one name and one seed.
    """
    from ..controller import find_controller_folder, load_controller
    from ..evaluation.sweep import BASELINES

    trained: list[Trained] = []
    for text in controller_paths:
        name, separator, path = text.partition("=")
        if not separator or Path(text).exists():  # a folder's name may have the sign
            name, path = CONTROLLER, text
        if not name or not path:
            raise ValueError(f"`controller_path` has '{text}': give a path, or `name=path`.")
        if name in BASELINES or name.endswith(NO_MASK):
            raise ValueError(f"`controller_path` has '{text}', but '{name}' is another policy: choose another name.")
        folder = find_controller_folder(path)
        controller = load_controller(folder)
        if trained and controller.knob_space != trained[0].controller.knob_space:
            raise ValueError(
                f"the controller in '{folder}' chooses from {controller.knob_space}, that in '{trained[0].folder}' from "
                f"{trained[0].controller.knob_space}: compare controllers of one knob space."
            )
        taken = {one.seed: one.folder for one in trained if one.name == name}
        seed = controller.config.training_seed
        if seed is None:
            # Not known: they are numbered.
            seed = next(number for number in range(len(taken) + 1) if number not in taken)
        if seed in taken:
            raise ValueError(
                f"the controllers in '{taken[seed]}' and '{folder}' are both named '{name}' and were trained with the seed "
                f"{seed}: give one of them another name, as `name=path`."
            )
        trained.append(Trained(name, seed, folder, controller))
    return trained


def resolve_estimator(args: SweepArguments, trained: Sequence[Trained]) -> None:
    """
    Takes the latency estimator that the first controller was trained with, and its scope, unless others are asked for.

    Raises:
        ValueError: If controllers were trained for latencies of different scopes, and none is asked for.
    """
    from ..executor import REQUEST_SCOPE
    from ..latency import read_latency_estimator
    from ..trainer.joint_grpo_trainer import LATENCY_ESTIMATOR_FOLDER

    trained_with = [(one.folder, one.folder / LATENCY_ESTIMATOR_FOLDER) for one in trained]
    trained_with = [(folder, estimator) for folder, estimator in trained_with if estimator.is_dir()]
    scopes = {folder: read_latency_estimator(estimator).latency_scope for folder, estimator in trained_with}
    if args.latency_scope is None and len(set(scopes.values())) > 1:
        told = ", ".join(f"'{folder}' for `{scope}`" for folder, scope in scopes.items())
        raise ValueError(f"controllers were trained for latencies of different scopes ({told}): give `latency_scope`.")
    if trained[0].folder in scopes:
        args.latency_estimator_path = args.latency_estimator_path or str(trained_with[0][1])
    args.latency_scope = args.latency_scope or scopes.get(trained[0].folder, REQUEST_SCOPE)


def begin_run(output_dir: Path, args: SweepArguments, trained: Sequence[Trained]) -> None:
    """
    Writes down what a run is of, so that it can go on when it was interrupted.

    Raises:
        ValueError: If the folder holds a run of other arguments or controllers.
    """
    from accelerate import PartialState

    from ..evaluation.request_table import REQUESTS_FILE
    from ..evaluation.summary import SWEEP_FILE

    if output_dir.is_file():
        raise ValueError(f"`output_dir` '{output_dir}' is a file: name a folder.")
    record: dict[str, Any] = {name: value for name, value in asdict(args).items() if name not in _NOT_RECORDED}
    record["controllers"] = [
        {"name": one.name, "seed": one.seed, "sha256": _digest_of_controller(one.folder)} for one in trained
    ]
    record = json.loads(json.dumps(record))
    file = output_dir / ARGUMENTS_FILE
    other = f"name another `output_dir`, or delete '{output_dir}'"
    if file.exists():
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"'{file}' cannot be read ({error}): {other}.") from error
        differing = [name for name in {**begun, **record} if begun.get(name) != record.get(name)]
        if differing:
            raise ValueError(
                f"`output_dir` '{output_dir}' holds another run: its `{differing[0]}` is {begun.get(differing[0])}, now it is "
                f"{record.get(differing[0])}. Give the same arguments to go on with it, or {other}."
            )
        return
    for name in (REQUESTS_FILE, SWEEP_FILE):
        if (output_dir / name).exists():
            raise ValueError(f"`output_dir` '{output_dir}' holds another run ({name}): {other}.")
    state = PartialState()
    state.wait_for_everyone()  # else one process may see what another has just written
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.tmp")
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(file)


def _digest_of_controller(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def make_requests(
    args: SweepArguments, trained: Sequence[Trained], requests_file: Path, console: Any
) -> "tuple[Dataset, list[Sample]]":
    """Answers, and with `measure` measures, what the policies choose; the main process writes the table. Returns it with the
    samples."""
    from accelerate import PartialState

    from ..data import read_samples
    from ..evaluation.baselines import KnownOutcomes, PredictedLatencies, TrainingOutcomes
    from ..evaluation.policies import ControllerPolicy
    from ..evaluation.request_table import NOT_TRAINED, write_request_table
    from ..evaluation.scoring import score_answer
    from ..evaluation.sweep import BASELINES, baseline_policies, sweep_budgets
    from ..latency import Guardrail
    from ..outcomes import OutcomeCollector, OutcomeStore, collect_shares
    from ..trainer.feature_cache import CachedFeatures

    state = PartialState()
    executor = load_executor_from(args, knob_space=trained[0].controller.knob_space)
    latency_estimator = load_latency_estimator(args, executor)
    guardrail = None
    if args.guardrail_quantile:
        guardrail = Guardrail(latency_estimator, executor, args.guardrail_quantile)
    rewards = _rewards(args, trained[0].controller)
    skipped_rows = open_skipped_rows(args, args.output_dir)
    samples = read_samples(load_split(args, args.dataset_split, args.max_samples, args.seed, skipped_rows))
    train_samples = read_samples(load_split(args, STATIC_SPLIT, args.max_static_samples, args.seed, skipped_rows))
    if skipped_rows and state.is_main_process:
        console.print(skipped_rows.summary())
    space = executor.knob_space
    folder = args.outcomes_dir or Path(args.output_dir) / "outcomes"
    store = OutcomeStore(folder, executor.fingerprint, space, args.known_outcomes or ())
    outcomes = OutcomeCollector(executor, store, score_answer)

    def answer_everywhere(some: Sequence[Mapping[str, Any]]) -> None:
        every_sample = [sample for sample in some for _ in space]
        collect_shares(outcomes, every_sample, list(space) * len(some), progress=True)

    answer_everywhere(train_samples)
    known = None
    if "ceiling" in args.policies:
        if state.is_main_process:
            console.print(
                f"The ceiling answers all {len(samples)} samples at all {len(space)} settings.", highlight=False
            )
        answer_everywhere(samples)
        known = KnownOutcomes(outcomes, latency_estimator)
    forecast = None if guardrail is None else PredictedLatencies(guardrail)
    training = TrainingOutcomes.collect(outcomes, latency_estimator, train_samples, rewards, forecast)
    full_setting_ms = float(training.mean_latency_ms[-1])
    budgets_ms = args.budgets_ms or [fraction * full_setting_ms for fraction in args.budget_fractions]
    names = [name for name in args.policies if name in BASELINES]
    baselines = baseline_policies(training, space, budgets_ms, names, forecast, known, args.seed)
    # All budgets and controllers look at the same questions and images.
    features = CachedFeatures(executor, space)
    policies: list[Policy] = []
    seeds: list[int] = []
    # Without a mask, a controller may still see what fits.
    no_mask = Guardrail(latency_estimator, executor, None)
    for asked, added, mask in ((CONTROLLER, "", guardrail), (CONTROLLER + NO_MASK, NO_MASK, no_mask)):
        for one in trained if asked in args.policies else ():
            policies.append(ControllerPolicy(one.controller.to(executor.device), features, one.name + added, mask))
            seeds.append(one.seed)
    policies += baselines
    seeds += [NOT_TRAINED] * len(baselines)
    requests = sweep_budgets(
        policies,
        outcomes,
        latency_estimator,
        samples,
        budgets_ms,
        full_setting_ms,
        rewards,
        seeds,
        forecast,
        together=True,
        progress=True,
    )
    if state.is_main_process:
        if args.measure:
            requests = _measured(args, requests, samples, trained, executor, latency_estimator, guardrail)
        write_request_table(requests, requests_file)
    return requests, samples


def _rewards(args: SweepArguments, controller: "JointControllerModel") -> "dict[RewardFunction, float]":
    from ..rewards import resolve_rewards

    if args.reward_funcs is None and controller.config.rewards is not None:
        weights = args.reward_weights or list(controller.config.rewards.values())
        return resolve_rewards(list(controller.config.rewards), weights)
    return resolve_rewards(args.reward_funcs, args.reward_weights)


def _measured(
    args: SweepArguments,
    requests: "Dataset",
    samples: Sequence[Mapping[str, Any]],
    trained: Sequence[Trained],
    executor: "Executor",
    latency_estimator: "LatencyEstimator",
    guardrail: "Guardrail | None",
) -> "Dataset":
    from ..controller import RequestController
    from ..evaluation.measuring import MEASUREMENTS_FILE, measure_requests
    from ..evaluation.request_table import NOT_TRAINED
    from ..evaluation.summary import STATIC
    from ..executor import MODEL_SCOPE
    from ..latency import Guardrail
    from ..latency.run_as_measured import torch_threads
    from ..request_path import RequestPath

    # Where latencies are the model's alone, a path has to know which stages count; where they are of whole requests, a
    # prediction that nobody asks for would count.
    unmasked = Guardrail(latency_estimator, executor, None) if latency_estimator.latency_scope == MODEL_SCOPE else None
    paths = {(STATIC, NOT_TRAINED): RequestPath(executor, None, unmasked)}
    for one in trained:
        controller = RequestController(one.controller.to(executor.device))
        if CONTROLLER in args.policies:
            paths[one.name, one.seed] = RequestPath(executor, controller, guardrail)
        else:
            paths[one.name + NO_MASK, one.seed] = RequestPath(executor, controller, unmasked)
    there = set(zip(requests["policy"], requests["seed"], strict=True))
    paths = {key: path for key, path in paths.items() if key in there}
    num_threads = None if latency_estimator.way is None else latency_estimator.way.num_threads
    threads = torch_threads(num_threads) if args.num_threads is None else nullcontext()
    with threads:
        return measure_requests(requests, samples, paths, Path(args.output_dir) / MEASUREMENTS_FILE, progress=True)


def make_parser() -> ScriptParser:
    return ScriptParser((SweepArguments,))


if __name__ == "__main__":
    sys.exit(run_script("sweep", make_parser, main))

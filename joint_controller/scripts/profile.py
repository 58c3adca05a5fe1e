"""
Times whole requests on this machine, stage by stage, over the executor's knob settings, at batch 1.

```bash
joint-controller profile --output_dir outputs/profile --report true
```
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.hf_argparser import HfArg

from . import ScriptParser, run_script
from .data_arguments import DatasetArguments, load_split, open_skipped_rows
from .executor_arguments import set_num_threads


if TYPE_CHECKING:
    from ..executor import Executor


REPEAT_FOLDER = "repeat"
"""Folder of the second profile, in that of the first."""


@dataclass(kw_only=True)
class ProfileArguments(DatasetArguments):
    """
    Arguments of `joint-controller profile`, besides those of [`DatasetArguments`].
    """

    output_dir: str = HfArg(
        help="Folder for the table of measurements (profile.parquet). A profile that was interrupted goes on here; one "
        "that is whole is not made again."
    )
    model_path: str = HfArg(
        default="embedded",
        help="Executor to measure: a folder or Hub name of a checkpoint, `embedded` for the one that ships, or `random:` "
        "and the name of sizes for random weights, made on the device: they cost the same.",
    )
    device: str | None = HfArg(
        default=None, help="Device to measure, e.g. `cpu` where there is a GPU, too. Default: the best one here."
    )
    executor_mode: str | None = HfArg(
        default=None, help="How the executor computes, of the ways that it has. Default: the fastest one here."
    )
    importance_path: str | None = HfArg(
        default=None, help="JSON of block importance scores. By default importance.json in the model folder."
    )
    knob_values: dict | str | list[str] | None = HfArg(
        default=None,
        help="Values of knobs, cheapest first: `--knob_values tier=low,high depth=4,8`, in a recipe also `{tier: [low, "
        "high], depth: [4, 8]}`. By default those that the executor's checkpoint gives.",
        metadata={"nargs": "+", "metavar": "KNOB=VALUE,VALUE"},
    )
    num_settings: int | None = HfArg(
        default=None,
        help="Settings to measure: a random sample with the cheapest and the most expensive. Default: all.",
    )
    dataset_names: list[str] | None = HfArg(
        default=None,
        help="Data sets that inputs are drawn from, as for training. Default: inputs that are made for the purpose, "
        "images of many shapes and questions of many lengths.",
    )
    dataset_split: str = HfArg(default="train", help="Split that inputs are drawn from: train, validation or test.")
    num_inputs: int = HfArg(default=12, help="Inputs that settings are measured with.")
    num_measurements: int | None = HfArg(
        default=None,
        help="Most measurements: a spread-out subset of settings x inputs. Default: each setting with each.",
    )
    repeats: int = HfArg(default=5, help="Times that a measurement is repeated; medians are kept.")
    decode_steps: int = HfArg(default=4, help="Decode steps that are timed a request, whatever the answer's length.")
    free_decoding: bool = HfArg(
        default=False,
        help="Time the steps until the answer ends, `max_new_tokens` at most, in place of `decode_steps`.",
    )
    max_new_tokens: int = HfArg(default=16, help="Most tokens of an answer with `free_decoding`.")
    time_limit_s: float | None = HfArg(
        default=None,
        help="Seconds that measuring may take, after a warm-up: if it would take longer, a spread-out subset is measured. "
        "Counts for each profile and each run of an interrupted one.",
    )
    check_repeatability: bool = HfArg(
        default=False,
        help=f"Measure everything once more, into the folder `{REPEAT_FOLDER}`, and report the share of settings whose "
        "medians agree within 3 percent.",
    )
    compare_with: str | None = HfArg(
        default=None, help="Another profile of the same to report the repeatability against, in place of measuring it."
    )
    report: bool = HfArg(
        default=False,
        help="Draw pictures of the profile (shares of the stages, prefill against tokens, decode against position, "
        "latency of each knob, FLOPs against latency) and write its card (README.md) and numbers "
        "(profile_report.json); also of a profile that is there already.",
    )
    push_to_hub: str | None = HfArg(
        default=None,
        help="Name (org/name) of a data set on the Hub to send the profile to, with its report. Needs a login.",
    )
    num_threads: int | None = HfArg(
        default=None,
        help="Threads that share one operation on the CPU: those that requests will be served with. Default: torch's.",
    )
    seed: int = HfArg(default=42, help="Seed of the inputs drawn and of the order of measurements.")


def main(args: ProfileArguments):
    from ..latency.profile_report import format_repeatability, write_profile_report
    from ..latency.profile_table import PROFILE_FILE, load_profile

    output_dir = Path(args.output_dir)
    if output_dir.is_file():
        raise ValueError(f"`output_dir` '{output_dir}' is a file: name a folder.")
    if args.check_repeatability and args.compare_with is not None:
        raise ValueError(
            "both `check_repeatability` and `compare_with` are given: the second profile is one or the other."
        )
    folders = [output_dir, output_dir / REPEAT_FOLDER] if args.check_repeatability else [output_dir]
    # Before anything is measured.
    repeated = None if args.compare_with is None else load_profile(args.compare_with)
    unfinished = [folder for folder in folders if not (folder / PROFILE_FILE).exists()]
    reports = args.report or args.check_repeatability or repeated is not None or args.push_to_hub is not None
    if not unfinished and not reports:
        raise FileExistsError(
            f"'{output_dir / PROFILE_FILE}' exists already: name another `output_dir`, delete the file, or give `--report "
            "true` to draw it."
        )
    if unfinished:
        _measure(args, unfinished)
    if not reports:
        return
    if args.check_repeatability:
        repeated = load_profile(output_dir / REPEAT_FOLDER)
    report = write_profile_report(load_profile(output_dir), output_dir, repeated)
    if "repeatability" in report:
        print(format_repeatability(report["repeatability"]))
    print(f"Report written to {output_dir}.")
    if args.push_to_hub is not None:
        _push(args.push_to_hub, output_dir)


def _measure(args: ProfileArguments, folders: list[Path]):
    from ..latency.profile_inputs import make_profile_inputs
    from ..latency.profile_journal import JOURNAL_FILE
    from ..latency.profile_table import load_profile, save_profile
    from ..latency.profiling import profile_executor, sample_settings

    executor = _load_executor(args)
    if args.dataset_names is None:
        dataset = make_profile_inputs(args.num_inputs, args.seed)
    else:
        skipped_rows = open_skipped_rows(args, args.output_dir)
        dataset = load_split(args, args.dataset_split, args.num_inputs, args.seed, skipped_rows)
        if skipped_rows:
            print(skipped_rows.summary())
    for folder in folders:
        # The second profile measures what the first one did.
        is_repeat = folder.name == REPEAT_FOLDER and args.check_repeatability
        num_measurements = len(load_profile(args.output_dir)) if is_repeat else args.num_measurements
        profile = profile_executor(
            executor,
            dataset,
            settings=sample_settings(executor.knob_space, args.num_settings, args.seed),
            repeats=args.repeats,
            decode_steps=None if args.free_decoding else args.decode_steps,
            num_measurements=num_measurements,
            time_limit_s=args.time_limit_s,
            journal_folder=folder,
            seed=args.seed,
        )
        file = save_profile(profile, folder)
        (folder / JOURNAL_FILE).unlink()
        print(f"{len(profile)} measurements written to {file}.")


def _load_executor(args: ProfileArguments) -> "Executor":
    import torch

    from ..executor import load_executor
    from ..knobs import parse_knob_values

    set_num_threads(args)
    if args.device is not None:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
            raise ValueError(
                f"`device` is '{args.device}', which is not there: {str(error).splitlines()[0]}"
            ) from error
    return load_executor(
        args.model_path,
        device=args.device,
        knob_values=parse_knob_values(args.knob_values),
        importance=args.importance_path,
        max_new_tokens=args.max_new_tokens,
        mode=args.executor_mode,
    )


def _push(repo_id: str, folder: Path):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    from ..latency.profile_table import PROFILE_FILE

    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=[PROFILE_FILE, "README.md", "*.png", "*.json"],
            ignore_patterns=[f"{REPEAT_FOLDER}/*"],
            commit_message="Add a latency profile",
        )
    except HTTPError as error:  # a refusal, or no connection
        raise OSError(f"the Hub did not take '{repo_id}' ({error}): the profile is whole in '{folder}'.") from error
    print(f"Pushed to https://huggingface.co/datasets/{repo_id}.")


def make_parser() -> ScriptParser:
    return ScriptParser((ProfileArguments,))


if __name__ == "__main__":
    sys.exit(run_script("profile", make_parser, main))

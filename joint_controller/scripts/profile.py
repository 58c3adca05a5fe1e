"""
Times the executor's stages on this machine over its knob settings, at batch 1.

```bash
joint-controller profile --dataset_names scenes easy_vqa --output_dir outputs/profile
```
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import ScriptParser, run_script
from .data_arguments import DatasetArguments, load_split, open_skipped_rows


@dataclass(kw_only=True)
class ProfileArguments(DatasetArguments):
    """
    Arguments of `joint-controller profile`, beside those of [`DatasetArguments`].
    """

    output_dir: str = field(metadata={"help": "New folder for the table of measurements (profile.parquet)."})
    model_path: str = field(
        default="embedded",
        metadata={
            "help": "Executor to measure: a folder or Hub name of a Molmo, or `embedded` for the one that ships."
        },
    )
    dataset_names: list[str] = field(
        default_factory=lambda: ["scenes", "easy_vqa"],
        metadata={"help": "Data sets that inputs are drawn from, as for training."},
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split that inputs are drawn from: train, validation or test."}
    )
    num_inputs: int = field(default=12, metadata={"help": "Inputs that every setting is measured with."})
    repeats: int = field(default=5, metadata={"help": "Times that a measurement is repeated; medians are kept."})
    decode_steps: int = field(
        default=4, metadata={"help": "Decode steps that are timed a request, whatever the answer's length."}
    )
    time_limit_s: float | None = field(
        default=None,
        metadata={"help": "Seconds the whole may take: if it would take longer, a spread-out subset is measured."},
    )
    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads that share one operation on the CPU: those that requests will be served with. Default: "
            "torch's."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the inputs drawn and of the order of measurements."})


def main(args: ProfileArguments):
    import torch

    from ..executor import MolmoExecutor
    from ..latency import profile_executor, save_profile
    from ..latency.profile_table import PROFILE_FILE

    output_file = Path(args.output_dir) / PROFILE_FILE
    # Before anything is loaded or measured: a profile may have taken hours.
    if output_file.exists():
        raise FileExistsError(f"'{output_file}' exists already: name another `output_dir`, or delete the file.")
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    executor = MolmoExecutor.from_pretrained(args.model_path)
    skipped_rows = open_skipped_rows(args, args.output_dir)
    dataset = load_split(args, args.dataset_split, args.num_inputs, args.seed, skipped_rows)
    if skipped_rows:
        print(skipped_rows.summary())
    profile = profile_executor(
        executor,
        dataset,
        repeats=args.repeats,
        decode_steps=args.decode_steps,
        time_limit_s=args.time_limit_s,
        seed=args.seed,
    )
    save_profile(profile, args.output_dir)
    print(f"{len(profile)} measurements written to {output_file}.")


def make_parser() -> ScriptParser:
    return ScriptParser((ProfileArguments,))


if __name__ == "__main__":
    sys.exit(run_script("profile", make_parser, main))

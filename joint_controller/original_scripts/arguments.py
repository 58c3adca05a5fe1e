"""The command line of the original training script: its flags as aliases of this package's fields, and its defaults."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers.hf_argparser import HfArg

from ..scripts import ScriptParser


# Flags of the original script by the field that each stands for, in the order in which they are taken.
_ALIASES = {
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "group_size": "num_generations",
    "load_stage1_checkpoint": "stage1_checkpoint",
    "batch_size": "per_device_train_batch_size",
    "device": "use_cpu",
}

# Defaults of the original script, which hold where results are trained on. `stage1_lr_ratio` (1.0) and `seed` (42) have
# the same default everywhere. No data sets means all; few samples are few steps.
_ORIGINAL_DEFAULTS = {
    "output_dir": "./checkpoints/joint_controller",
    "batch_size": 32,
    "num_epochs": 100,
    "lr": 1e-4,
    "group_size": 5,
    "device": "cuda",
    "save_every_n_epochs": 10,
    "dataset_names": [],
    "logging_strategy": "epoch",
}

# Fields that say the same as one with a default of the original script.
_RELATED = {
    "save_every_n_epochs": {"save_steps", "save_strategy", "eval_steps", "eval_strategy"},
    "logging_strategy": {"logging_steps"},
}

# Fields that say what an executor or a data set does, where there is neither.
_WITHOUT_EFFECT_ON_RESULTS = (
    *("importance_path", "max_new_tokens", "executor_batch_size", "executor_workers", "precompute_outcomes"),
    *("outcomes_dir", "known_outcomes", "dataset_weights", "train_split", "eval_split", "test_split", "streaming"),
)


@dataclass
class OriginalArguments:
    """Arguments of the original training script: where the recorded results are, and other names of recipe fields."""

    given: frozenset[str] = field(init=False, default=frozenset())
    """Fields that flags or recipe named."""

    results_dir: str | None = HfArg(
        default=None,
        help="Folder of recorded results to train on, without running an executor: as the original profiling scripts "
        "wrote it, or as `joint-controller import-results` did. With it, defaults are those of the original script: "
        "batch_size 32, num_epochs 100, lr 1e-4, group_size 5, device cuda, save_every_n_epochs 10, output_dir "
        "./checkpoints/joint_controller; dataset_names are all that the folder has, budgets go from what the "
        "cheapest setting takes to what the slowest one takes, and model_path only gives the features of questions "
        "and images: without one, the controller sees the budget alone.",
    )
    image_dir: str | None = HfArg(
        default=None,
        help="Folder of the images of the recorded samples: files named by image id, in a folder for each data set or "
        "together. Without one, stage 2 does not see the image. Needs results_dir and model_path.",
    )
    batch_size: int | None = HfArg(
        default=None, help="Samples in a batch: per_device_train_batch_size is this times num_generations."
    )
    num_epochs: int | None = HfArg(default=None, help="Another name of num_train_epochs.")
    lr: float | None = HfArg(default=None, help="Another name of learning_rate.")
    group_size: int | None = HfArg(default=None, help="Another name of num_generations.")
    device: str | None = HfArg(
        default=None,
        help="Device to train on. `cpu` is another name of use_cpu; `cuda` is refused where there is none. Default: the "
        "best one that there is; with results_dir, cuda.",
        metadata={"choices": ["cpu", "cuda"]},
    )
    load_stage1_checkpoint: str | None = HfArg(default=None, help="Another name of stage1_checkpoint.")


class TrainParser(ScriptParser):
    """
    [`ScriptParser`] that knows the original script's names: the last of its dataclasses is [`OriginalArguments`]. A flag beats
    the recipe, whichever of a field's names each uses; two names with different values, both as flags or both in the recipe,
    are an error.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs):
        super().__init__(dataclass_types, **kwargs)
        self._ranks: dict[str, int] = {}  # 1: named in the recipe, 2: given as a flag

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple[Any, ...]:
        """
        As [`ScriptParser.parse_args_and_config`]; the last of the instances, [`OriginalArguments`], then knows in `given`
        which fields flags or recipe named.
        """
        parsed = super().parse_args_and_config(args, **kwargs)
        parsed[-1].given = frozenset(self._ranks)
        return parsed

    def set_defaults_with_config(self, **recipe: Any) -> list[str]:
        self._ranks.update(dict.fromkeys(recipe, 1))
        return super().set_defaults_with_config(**recipe)

    def parse_known_args(self, args=None, namespace=None):
        # Before the dataclasses are built: the fields that aliases stand for are checked there.
        namespace, unknown = super().parse_known_args(args, namespace)
        flags = {arg.split("=", 1)[0] for arg in args or () if arg.startswith("--")}
        self._ranks.update({action.dest: 2 for action in self._actions if flags.intersection(action.option_strings)})
        self._translate(namespace)
        return namespace, unknown

    def _translate(self, namespace: argparse.Namespace):
        """Fills in the original defaults, and sets fields to what their aliases say, unless they have the higher rank."""
        values, given = vars(namespace), self._ranks.keys()
        if namespace.results_dir is not None:
            without_effect = sorted(given & set(_WITHOUT_EFFECT_ON_RESULTS))
            if without_effect:
                raise ValueError(
                    f"`{without_effect[0]}` has no effect on results that were recorded before (`results_dir`): leave it "
                    "out."
                )
            for name, value in _ORIGINAL_DEFAULTS.items():
                if not given & {name, _ALIASES.get(name), *_RELATED.get(name, ())}:
                    values[name] = value
        elif "image_dir" in given:
            raise ValueError("`image_dir` is for recorded results: give `results_dir` with it.")
        for alias, name in _ALIASES.items():
            value = values[alias]
            if value is None:
                continue
            if alias == "batch_size":
                value *= namespace.num_generations
            elif alias == "device":
                value = value == "cpu"
            rank, other = self._ranks.get(alias, 0), self._ranks.get(name, 0)
            if rank and rank == other and value != values[name]:
                raise ValueError(
                    f"`{alias}` {values[alias]} means `{name}` {value}, but `{name}` is {values[name]}: give one of them."
                )
            if rank >= other:
                values[name] = value
        if namespace.save_every_n_epochs is not None:
            values.update({name: "epoch" for name in ("eval_strategy", "save_strategy") if name not in given})

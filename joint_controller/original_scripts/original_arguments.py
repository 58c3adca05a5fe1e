"""The command line of the original training script: its flags as aliases of this package's fields, and its defaults."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..scripts import ScriptParser


# Flags of the original script by the field that each stands for. `batch_size` and `device` need more than another name.
_ALIASES = {
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "group_size": "num_generations",
    "load_stage1_checkpoint": "stage1_checkpoint",
}

# Defaults of the original script, which hold where results are trained on. `stage1_lr_ratio` (1.0) and `seed` (42) have
# the same default everywhere.
_ORIGINAL_DEFAULTS = {
    "output_dir": "./checkpoints/joint_controller",
    "batch_size": 32,
    "num_epochs": 100,
    "lr": 1e-4,
    "group_size": 5,
    "device": "cuda",
    "save_every_n_epochs": 10,
}

# Fields that say what an executor or a data set does, where there is neither.
_WITHOUT_EFFECT_ON_RESULTS = (
    *("importance_path", "max_new_tokens", "executor_batch_size", "executor_workers", "precompute_outcomes"),
    *("outcomes_dir", "dataset_weights", "train_split", "eval_split", "test_split", "streaming"),
)


@dataclass
class OriginalArguments:
    """
    Arguments of the original training script: where the recorded results are, and other names of recipe fields.
    """

    results_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of recorded results to train on, without running an executor: as the original profiling scripts "
            "wrote it, or as `joint-controller import-results` did. With it, defaults are those of the original script: "
            "batch_size 32, num_epochs 100, lr 1e-4, group_size 5, device cuda, save_every_n_epochs 10, output_dir "
            "./checkpoints/joint_controller; dataset_names are all that the folder has, budgets go from what the cheapest "
            "setting takes to what the slowest one takes, and model_path only gives the features of questions and images: "
            "without one, the controller sees the budget alone."
        },
    )
    image_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the images of the recorded samples: files named by image id, in a folder for each data set or "
            "together. Without one, stage 2 does not see the image. Needs results_dir and model_path."
        },
    )
    batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples in a batch: per_device_train_batch_size is this times num_generations."},
    )
    num_epochs: int | None = field(default=None, metadata={"help": "Another name of num_train_epochs."})
    lr: float | None = field(default=None, metadata={"help": "Another name of learning_rate."})
    group_size: int | None = field(default=None, metadata={"help": "Another name of num_generations."})
    device: str | None = field(
        default=None,
        metadata={
            "help": "Device to train on. `cpu` is another name of use_cpu; `cuda` is refused where there is none. Default: "
            "the best one that there is; with results_dir, cuda.",
            "choices": ["cpu", "cuda"],
        },
    )
    load_stage1_checkpoint: str | None = field(default=None, metadata={"help": "Another name of stage1_checkpoint."})


class TrainParser(ScriptParser):
    """
    [`ScriptParser`] that knows the original script's names. A flag beats the recipe, whichever of a field's names each
    uses; two names with different values, both as flags or both in the recipe, are an error.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs):
        super().__init__(dataclass_types, **kwargs)
        self._ranks: dict[str, int] = {}  # 1: named in the recipe, 2: given as a flag

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple[Any, ...]:
        """
        As [`ScriptParser.parse_args_and_config`]; the first of the instances then knows in `given` which fields flags or
        recipe named.
        """
        parsed = super().parse_args_and_config(args, **kwargs)
        parsed[0].given = frozenset(self._ranks)
        return parsed

    def set_defaults_with_config(self, **recipe: Any) -> list[str]:
        self._ranks.update(dict.fromkeys(recipe, 1))
        return super().set_defaults_with_config(**recipe)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        flags = {arg.split("=", 1)[0] for arg in args or () if arg.startswith("--")}
        for action in self._actions:
            if flags.intersection(action.option_strings):
                self._ranks[action.dest] = 2
        self._translate(namespace)
        return namespace, unknown

    def _translate(self, namespace: argparse.Namespace):
        given = frozenset(self._ranks)
        if namespace.results_dir is not None:
            self._check_results_arguments(given)
            self._take_original_defaults(namespace, given)
        elif "image_dir" in given:
            raise ValueError("`image_dir` is for recorded results: give `results_dir` with it.")
        for alias, name in _ALIASES.items():
            self._take(namespace, alias, name, getattr(namespace, alias))
        if namespace.batch_size is not None:
            num_rows = namespace.batch_size * namespace.num_generations
            self._take(namespace, "batch_size", "per_device_train_batch_size", num_rows)
        if namespace.device is not None:
            self._take(namespace, "device", "use_cpu", namespace.device == "cpu")
        if namespace.save_every_n_epochs is not None:
            for name in ("eval_strategy", "save_strategy"):
                if name not in given:
                    setattr(namespace, name, "epoch")

    def _check_results_arguments(self, given: frozenset[str]):
        without_effect = sorted(given.intersection(_WITHOUT_EFFECT_ON_RESULTS))
        if without_effect:
            raise ValueError(
                f"`{without_effect[0]}` has no effect on results that were recorded before (`results_dir`): leave it out."
            )

    def _take_original_defaults(self, namespace: argparse.Namespace, given: frozenset[str]):
        other_names = {**_ALIASES, "batch_size": "per_device_train_batch_size", "device": "use_cpu"}
        saving = {"save_steps", "save_strategy", "eval_steps", "eval_strategy"}
        for name, value in _ORIGINAL_DEFAULTS.items():
            names = {name, other_names.get(name, name)} | (saving if name == "save_every_n_epochs" else set())
            if not names & given:
                setattr(namespace, name, value)
        if "dataset_names" not in given:
            namespace.dataset_names = []  # all
        if not {"logging_strategy", "logging_steps"} & given:
            namespace.logging_strategy = "epoch"  # few samples are few steps

    def _take(self, namespace: argparse.Namespace, alias: str, name: str, value: Any):
        """Sets a field to what its alias says, unless the field itself was given with more right."""
        if getattr(namespace, alias) is None:
            return
        rank, other = self._ranks.get(alias, 0), self._ranks.get(name, 0)
        current = getattr(namespace, name)
        if rank and rank == other and value != current:
            raise ValueError(
                f"`{alias}` {getattr(namespace, alias)} means `{name}` {value}, but `{name}` is {current}: give one of them."
            )
        if rank >= other:
            setattr(namespace, name, value)

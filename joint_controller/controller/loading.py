"""A controller from wherever it is, refused in one line where it is broken."""

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from .modeling_joint_controller import JointControllerModel


def find_controller_folder(controller_path: str | Path) -> Path:
    """
    The folder of a controller; a Hub repository is fetched into the local cache.

    Args:
        controller_path (`str` or `Path`):
            Output folder of a training, or the name of a Hub repository (`org/name`).

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(controller_path)
    if (folder / "config.json").is_file():
        return folder
    what_to_give = "give the output folder of `joint-controller train`, or the name of a Hub repository (org/name)"
    if folder.exists() or re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(controller_path)) is None:
        raise FileNotFoundError(
            f"`controller_path` '{controller_path}' is not the folder of a controller: {what_to_give}."
        )
    try:
        return Path(snapshot_download(str(controller_path), ignore_patterns=["checkpoint-*", "outcomes/*"]))
    except OSError as error:
        raise FileNotFoundError(
            f"`controller_path` '{controller_path}' is not a folder here, and the Hub did not give a repository of that name "
            f"({type(error).__name__}): {what_to_give}."
        ) from error


def load_controller(controller_path: str | Path) -> JointControllerModel:
    """
    Loads a controller.

    Args:
        controller_path (`str` or `Path`):
            As in [`find_controller_folder`].

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its weights are cut short, do not fit its configuration, or are not finite.
    """
    folder = find_controller_folder(controller_path)
    weights = folder / "model.safetensors"
    try:
        controller, report = JointControllerModel.from_pretrained(folder, output_loading_info=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"'{weights}' cannot be read ({reason}): train the controller again, or copy the whole file."
        ) from error
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]], key=str)
    if wrong:
        raise ValueError(
            f"'{weights}' does not fit '{folder / 'config.json'}' ({wrong[0]} and {len(wrong) - 1} other weights differ): they "
            "are not of one controller."
        )
    for name, parameter in controller.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"'{weights}' holds weights that are not finite ('{name}'): its training went astray.")
    return controller

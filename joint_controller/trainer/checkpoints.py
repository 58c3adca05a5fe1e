"""Finding a checkpoint to resume from after the process was killed, perhaps while it wrote one."""

import json
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# `Trainer._save_checkpoint` writes these in this order: a trainer state that parses means that the others are whole.
_CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def last_complete_checkpoint(output_dir: str | Path, num_processes: int = 1) -> str | None:
    """
    The checkpoint with the most steps that was written to the end.

    Args:
        output_dir (`str` or `Path`):
            Folder of the run, with `checkpoint-<step>` folders in it.
        num_processes (`int`, *optional*, defaults to 1):
            Processes of the run: each saves the state of its random number generators.

    Returns:
        `str` or `None`: Path of the checkpoint, or `None` if there is none.
    """
    checkpoints = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if match and folder.is_dir():
            checkpoints[int(match[1])] = folder
    for step in sorted(checkpoints, reverse=True):
        if _is_complete(checkpoints[step], step, num_processes):
            return str(checkpoints[step])
    return None


def _is_complete(checkpoint: Path, step: int, num_processes: int) -> bool:
    if num_processes == 1:
        rng_files = ["rng_state.pth"]
    else:
        rng_files = [f"rng_state_{process_index}.pth" for process_index in range(num_processes)]
    if not all((checkpoint / name).is_file() for name in (*_CHECKPOINT_FILES, *rng_files)):
        return False
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    return state["global_step"] == step

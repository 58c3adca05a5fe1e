"""What `joint-controller train` shows while it trains: one line of progress, a row for each evaluation; all else is logged."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


if TYPE_CHECKING:
    from ..knobs import KnobSetting
    from ..trainer import JointGRPOTrainer


BUDGETS = ("tight", "middle", "ample")
"""Thirds of the evaluated requests by their budgets."""

_METRICS = {"reward": "{:.3f}", "accuracy": "{:.3f}", "latency_ms": "{:.1f} ms", "budget_violation_rate": "{:.1%}"}
_HEADINGS = {
    "reward": "reward",
    "accuracy": "accuracy",
    "latency_ms": "latency",
    "budget_violation_rate": "violations",
}


class MetricsLog(TrainerCallback):
    """
    Writes every entry of the trainer's log to the files of a logger, as JSON.

    Args:
        logger (`logging.Logger`):
            Only its file handlers are written to.
    """

    def __init__(self, logger: logging.Logger):
        self.logger = logger

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            for handler in self.logger.handlers:
                if isinstance(handler, logging.FileHandler):
                    entry = json.dumps({"step": state.global_step, **logs}, default=float)
                    handler.emit(self.logger.makeRecord(self.logger.name, logging.INFO, __file__, 0, entry, (), None))


class TrainingConsole(TrainerCallback):
    """
    Shows the progress of a training: on a terminal one line that is kept up to date, and a row of a table for each
    evaluation; in a pipe, or with `disable_tqdm`, one line for each logged step and evaluation.

    Args:
        trainer ([`JointGRPOTrainer`]):
            The trainer: its `evaluation_decisions` are shown.
    """

    def __init__(self, trainer: "JointGRPOTrainer"):
        self.trainer = trainer
        self._bar: tqdm | None = None
        self._table_is_open = False
        knobs = "·".join(trainer.knob_space.names)
        self._columns = ["step", *_HEADINGS.values(), "entropy", *(f"{budget} budgets" for budget in BUDGETS)]
        longest = max(len(_values(setting)) for setting in trainer.knob_space)
        self._widths = [max(len(heading), 9) for heading in self._columns[:-3]]
        self._widths += [max(len(heading), longest) for heading in self._columns[-3:]]
        self._note = f"Last columns: the likeliest {knobs} in each third of the requests, by their budgets."

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            # Unless the output is a terminal, tqdm shows nothing.
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="Training",
                unit="step",
                disable=args.disable_tqdm or None,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is None or "reward" not in logs:
            return
        shown = _format(logs)
        if self._bar.disable:
            print(f"step {state.global_step}/{state.max_steps}  {_in_words(shown, logs)}", flush=True)
        else:
            self._bar.set_postfix_str(", ".join(f"{_HEADINGS[name]} {value}" for name, value in shown.items()))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not state.is_world_process_zero:
            return
        metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        shown, chosen = _format(metrics), likeliest_by_budget(self.trainer.evaluation_decisions)
        if self._bar is None or self._bar.disable:
            knobs = ", ".join(f"{budget} {values}" for budget, values in zip(BUDGETS, chosen, strict=True))
            step = f"step {state.global_step}/{state.max_steps}"
            print(f"{step}  evaluation: {_in_words(shown, metrics)}  {knobs}", flush=True)
            return
        if not self._table_is_open:
            self._table_is_open = True
            self._bar.write(f"{self._note}\n{self._row(self._columns)}")
        cells = [str(state.global_step), *shown.values(), _entropy(metrics), *chosen]
        self._bar.write(self._row(cells))

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()

    def _row(self, cells: Sequence[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))


def likeliest_by_budget(decisions: "Sequence[tuple[float, KnobSetting]]") -> list[str]:
    """
    The value of each knob that was taken most often, in each third of the requests by budget, e.g.
    `["low·4", "high·4", "high·8"]`.

    Args:
        decisions (`Sequence[tuple[float, KnobSetting]]`):
            Budget in ms and setting of each evaluated request.
    """
    ordered = [setting for _, setting in sorted(decisions, key=lambda decision: decision[0])]
    parts = [
        ordered[len(ordered) * part // len(BUDGETS) : len(ordered) * (part + 1) // len(BUDGETS)] for part in range(3)
    ]
    return [
        "·".join(str(Counter(setting[name] for setting in part).most_common(1)[0][0]) for name in part[0])
        if part
        else "-"
        for part in parts
    ]


def _values(setting: "KnobSetting") -> str:
    return "·".join(map(str, setting.values()))


def _format(metrics: Mapping[str, Any]) -> dict[str, str]:
    return {name: form.format(float(metrics[name])) for name, form in _METRICS.items()}


def _entropy(metrics: Mapping[str, Any]) -> str:
    return f"{float(metrics['entropy']):.2f}" if "entropy" in metrics else "-"


def _in_words(shown: Mapping[str, str], metrics: Mapping[str, Any]) -> str:
    return "  ".join(
        [*(f"{_HEADINGS[name]} {value}" for name, value in shown.items()), f"entropy {_entropy(metrics)}"]
    )

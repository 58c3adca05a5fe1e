"""Checkpoints by epoch: every few epochs, at the end, and whenever the controller is better than ever."""

from transformers import TrainerCallback


class EpochCheckpoints(TrainerCallback):
    """
    Thins out the checkpoints of `save_strategy` "epoch", where a controller is evaluated after every epoch: one is kept
    every few epochs, at the end of training, and after an evaluation that is better than all before, so that the best
    controller is among them.

    Args:
        every_n_epochs (`int`):
            Epochs between two checkpoints.
    """

    def __init__(self, every_n_epochs: int):
        self.every_n_epochs = every_n_epochs

    def on_epoch_end(self, args, state, control, **kwargs):
        is_last = state.global_step >= state.max_steps
        control.should_save = is_last or round(state.epoch) % self.every_n_epochs == 0

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # Evaluations before the first step and by steps have no part in this; nothing is trained or the epoch goes on.
        if state.global_step and args.metric_for_best_model in metrics:
            value, best = metrics[args.metric_for_best_model], state.best_metric
            is_better = best is None or (value > best if args.greater_is_better else value < best)
            control.should_save = control.should_save or is_better

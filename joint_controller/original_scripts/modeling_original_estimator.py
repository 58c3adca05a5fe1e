"""The latency estimator of the original scripts, read from its `best_latency_estimator.pt`."""

import pickle
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..executor import Executor
from ..knobs import KnobSetting
from ..latency.latency_estimator import ModelLatencies
from ..molmo.knob_space import TIERS
from ..outcomes import Outcome


logger = logging.get_logger(__name__)

INPUTS = ("vision_tokens", "text_tokens", "tier_index", "top_k", "num_active_blocks")
"""What the configuration encoder reads, in this order. The tier's index is 0 for low, 1 for medium, 2 for high."""

_PARTS = ("config_encoder", "prefill_head", "position_encoder", "decode_head")
_ENCODERS = ("config_encoder", "position_encoder")

# Parts of a checkpoint that hold further entries.
_NESTED_KEYS = "normalization normalization_stats stats config model_config args hyperparameters".split()
# What a checkpoint may say of the scale of inputs and outputs.
_INPUT_STATISTICS = dict.fromkeys(("input_mean", "feature_mean"), "input_mean")
_INPUT_STATISTICS |= dict.fromkeys(("input_std", "feature_std"), "input_std")
_OUTPUT_STATISTICS = ("prefill_mean", "prefill_std", "decode_mean", "decode_std")
# Entries that have no bearing on what the weights predict: how they were trained, and what they show themselves.
_WITHOUT_EFFECT = set(
    "epoch best_epoch step global_step timestamp optimizer_state_dict scheduler_state_dict lr_scheduler_state_dict "
    "scaler_state_dict loss train_loss val_loss best_loss best_val_loss best_metric history metrics train_losses val_losses "
    "train_metrics val_metrics test_metrics batch_size dataset_names device dropout early_stopping epochs grad_clip "
    "learning_rate lr max_epochs num_epochs num_workers output_dir patience results_dir seed val_split weight_decay "
    "num_layers input_dim".split()
)


class OriginalLatencyEstimatorConfig(PreTrainedConfig):
    r"""
    Configuration of [`OriginalLatencyEstimatorModel`].

    Args:
        weight_shapes (`dict[str, list[list[int]]]`, *optional*):
            Shapes of the weights of `config_encoder`, `prefill_head`, `position_encoder` and `decode_head`, layer by layer:
            `[outputs, inputs]` of a linear layer, `[size]` of a layer norm.
        input_mean (`list[float]`, *optional*):
            Subtracted from the five inputs.
        input_std (`list[float]`, *optional*):
            What the five inputs are then divided by.
        prefill_mean, prefill_std, decode_mean, decode_std (`float`, *optional*, default to 0, 1, 0, 1):
            Scale of the two outputs.
    """

    model_type = "original_latency_estimator"

    weight_shapes: dict[str, list[list[int]]] | None = None
    input_mean: list[float] | None = None
    input_std: list[float] | None = None
    prefill_mean: float = 0.0
    prefill_std: float = 1.0
    decode_mean: float = 0.0
    decode_std: float = 1.0


class OriginalLatencyEstimatorModel(ModelLatencies, PreTrainedModel):
    """
    Predicts what the model's stages of a request cost at batch 1, by the network that the original scripts trained: a
    [`~latency.LatencyEstimator`] over the knobs `tier`, `top_k` and `num_blocks`. Made by
    [`read_original_latency_estimator`].

    The original scripts count a decode step for every output token, so a request takes `prefill_ms` and the decode time
    at the positions 0 to `output_tokens - 1`.

    Args:
        config ([`OriginalLatencyEstimatorConfig`]):
            Its layers. Activations leave no trace in weights: a ReLU is taken to follow each layer norm, and each linear
            layer that no layer norm follows, but for the last layer of a head.
    """

    config_class = OriginalLatencyEstimatorConfig
    config: OriginalLatencyEstimatorConfig

    def __init__(self, config: OriginalLatencyEstimatorConfig):
        super().__init__(config)
        for part in _PARTS:
            shapes = (config.weight_shapes or {}).get(part, [])
            layers = [nn.Linear(*shape[::-1]) if len(shape) == 2 else nn.LayerNorm(*shape) for shape in shapes]
            self.add_module(part, nn.ModuleList(layers))
        self.requires_grad_(False)
        self.post_init()

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Estimates for n requests the prefill and the decode step at a position among the output tokens, from 0, both in ms of
        shape (n,), from the values of `INPUTS`, (n, 5), and the positions, (n,).
        """
        config, inputs = self.config, inputs.to(self.dtype)
        if config.input_mean is not None:
            inputs = inputs - inputs.new_tensor(config.input_mean)
        if config.input_std is not None:
            inputs = inputs / inputs.new_tensor(config.input_std)
        encoded = self._run("config_encoder", inputs)  # (n, size)
        encoded_position = self._run("position_encoder", torch.log(position.to(self.dtype) + 1)[:, None])
        prefill_ms = self._run("prefill_head", encoded)[:, 0]
        decode_ms = self._run("decode_head", torch.cat([encoded, encoded_position], dim=-1))[:, 0]
        return (
            prefill_ms * config.prefill_std + config.prefill_mean,
            decode_ms * config.decode_std + config.decode_mean,
        )

    def _run(self, part: str, values: torch.Tensor) -> torch.Tensor:
        dimensions = [len(shape) for shape in self.config.weight_shapes[part]]
        for layer, following in zip(self.get_submodule(part), [*dimensions[1:], None], strict=True):
            values = layer(values)
            if part in _ENCODERS if following is None else following == 2:
                values = torch.relu(values)
        return values

    def latency_ms(self, outcomes: Sequence[Outcome]) -> torch.Tensor:
        """As [`LatencyEstimator.latency_ms`]."""
        settings = [outcome.setting for outcome in outcomes]
        counts = {name: [outcome.counts[name] for outcome in outcomes] for name in outcomes[0].counts}
        return self.predict_latency_ms(settings, counts, [outcome.output_tokens for outcome in outcomes]).cpu()

    def predict_latency_ms(
        self,
        settings: Sequence[KnobSetting],
        counts: Mapping[str, torch.Tensor | Sequence[int]],
        output_tokens: torch.Tensor | Sequence[int],
        quantile: float | None = None,
    ) -> torch.Tensor:
        """
        As [`LatencyEstimator.predict_latency_ms`]. Of the counts, `vision_tokens` and `text_tokens` are read: the network
        knows the tier instead of the number of views.

        Raises:
            ValueError: If a quantile is asked for, shapes do not fit each other, an answer has no token, a setting has
                other knobs, or what the network gives is not a time.
        """
        if quantile is not None:
            raise ValueError(
                "this asks for upper quantiles, which the original latency estimators do not predict: give an estimator "
                "that `joint-controller fit-latency` fitted."
            )
        knobs = torch.tensor([_knob_inputs(setting) for setting in settings], device=self.device)  # (settings, 3)
        tokens = [counts["vision_tokens"], counts["text_tokens"], output_tokens]
        tokens = [torch.as_tensor(values, device=self.device) for values in tokens]
        shapes = [tuple(values.shape) for values in tokens]
        try:
            shape = torch.broadcast_shapes(*shapes, (len(settings),))
        except RuntimeError:
            shape = ()
        if shape[-1:] != (len(settings),):
            raise ValueError(
                f"`vision_tokens`, `text_tokens` and `output_tokens` have the shapes {shapes} but there are {len(settings)} "
                "settings: give one value a setting."
            )
        # One row for each request at each setting, and then for each position in its answer.
        knobs = knobs.expand(*shape, -1).flatten(end_dim=-2)
        vision_tokens, text_tokens, output_tokens = (values.expand(shape).flatten() for values in tokens)
        if (output_tokens < 1).any():
            raise ValueError(
                f"`output_tokens` holds {int(output_tokens.min())}: an answer has 1 token at least, its end of sequence."
            )
        inputs = torch.cat([vision_tokens[:, None], text_tokens[:, None], knobs], dim=1)
        request = torch.repeat_interleave(output_tokens)
        first_row = output_tokens.cumsum(0) - output_tokens
        position = torch.arange(len(request), device=self.device) - first_row[request]
        prefill_ms, decode_ms = self(inputs[request], position)
        latency_ms = prefill_ms[first_row].index_add(0, request, decode_ms)
        if not (latency_ms > 0).all():
            row = int(latency_ms.argmin())
            raise ValueError(
                f"the original latency estimator gives {latency_ms[row]:.3f} ms for a request at "
                f"{settings[row % len(settings)]}, which is not a time: its file may lack the statistics that its inputs or "
                "outputs were scaled by."
            )
        return latency_ms.reshape(shape)

    def check_executor(self, executor: Executor) -> None:
        """Warns: the original scripts do not say which executor they measured, so nothing can be checked."""
        logger.warning(
            "the original latency estimator does not say which executor it is of: make sure that it is this one."
        )


def _knob_inputs(setting: KnobSetting) -> list[int]:
    try:
        return [TIERS.index(setting["tier"]), setting["top_k"], setting["num_blocks"]]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"the original latency estimator cannot read the setting '{setting}': it knows tier ({', '.join(TIERS)}), top_k "
            "and num_blocks."
        ) from error


def read_original_latency_estimator(path: str | Path) -> OriginalLatencyEstimatorModel:
    """
    Reads `best_latency_estimator.pt`, as the original scripts saved it, without unpickling any object. Layers follow from
    the shapes of the weights: a matrix is a linear layer, a vector is a layer norm.

    Args:
        path (`str` or `Path`):
            The file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it holds objects other than tensors and plain values, lacks weights, its layers do not fit each
            other, or it holds something that is not understood.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"latency estimator '{path}' does not exist: check the path.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"'{path}' cannot be read as tensors and plain values ({str(error).splitlines()[0]}): save a dict of "
            "`model_state_dict` alone with `torch.save`."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        raise ValueError(
            f"'{path}' is not a dict with a `model_state_dict`, which an original latency estimator is: give another file."
        )
    weights: dict[str, dict[int, dict[str, torch.Tensor]]] = {part: {} for part in _PARTS}
    for name, tensor in checkpoint.pop("model_state_dict").items():
        match = re.fullmatch(r"(?:module\.)?(\w+)\.(\d+)\.(weight|bias)", name)
        if match is None or match[1] not in weights or tensor.dim() not in (1, 2):
            raise ValueError(
                f"'{path}' has the weight '{name}', which is not understood: parts are {', '.join(_PARTS)}."
            )
        weights[match[1]].setdefault(int(match[2]), {})[match[3]] = tensor.float()
    shapes: dict[str, list[list[int]]] = {}
    state: dict[str, torch.Tensor] = {}
    for part, numbered in weights.items():
        layers = [numbered[number] for number in sorted(numbered)]  # numbers have gaps where layers have no weights
        if not layers or any(set(layer) != {"weight", "bias"} for layer in layers):
            raise ValueError(f"'{path}' lacks weights or biases of '{part}': it is incomplete.")
        shapes[part] = [list(layer["weight"].shape) for layer in layers]
        for position, layer in enumerate(layers):
            if layer["bias"].shape != layer["weight"].shape[:1]:
                raise ValueError(f"'{path}', '{part}': weights and biases of a layer have other sizes.")
            state.update({f"{part}.{position}.{name}": tensor for name, tensor in layer.items()})
    _check_sizes(shapes, path)
    config = OriginalLatencyEstimatorConfig(weight_shapes=shapes, **_read_statistics(checkpoint, shapes, path))
    model = OriginalLatencyEstimatorModel(config)
    model.load_state_dict(state)
    return model.eval()


def _check_sizes(shapes: Mapping[str, list[list[int]]], path: Path):
    def size_after(part: str, size: int) -> int:
        for shape in shapes[part]:
            if shape[-1] != size:
                raise ValueError(f"'{path}', '{part}': a layer takes {shape[-1]} values, but is given {size}.")
            size = shape[0]
        return size

    encoded = size_after("config_encoder", len(INPUTS))
    for part, given in (("prefill_head", encoded), ("decode_head", encoded + size_after("position_encoder", 1))):
        if (size := size_after(part, given)) != 1:
            raise ValueError(f"'{path}', '{part}': it gives {size} values where a time is one.")


def _read_statistics(
    checkpoint: Mapping[str, Any], shapes: Mapping[str, list[list[int]]], path: Path
) -> dict[str, Any]:
    """What the checkpoint says about the scale of inputs and outputs. Refuses what is not understood."""
    statistics: dict[str, Any] = {}
    entries = dict(checkpoint)
    for key in _NESTED_KEYS:
        entries.update(entries.pop(key, None) or {})
    hidden_sizes = {shape[0] for shape in shapes["config_encoder"]}
    for key, value in entries.items():
        if key in _INPUT_STATISTICS:
            values = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
            if len(values) != len(INPUTS):
                raise ValueError(f"'{path}', '{key}': it has {len(values)} values for {len(INPUTS)} inputs.")
            statistics[_INPUT_STATISTICS[key]] = values
        elif key in _OUTPUT_STATISTICS:
            statistics[key] = float(value)
        elif key in ("hidden_dim", "hidden_size"):
            if value not in hidden_sizes:
                raise ValueError(f"'{path}' says `{key}` {value}, but its layers are {sorted(hidden_sizes)} wide.")
        elif key not in _WITHOUT_EFFECT and (key != "activation" or str(value).lower() != "relu"):
            raise ValueError(
                f"'{path}' holds `{key}` {reprlib.repr(value)}, which is not understood and may change what is predicted: if "
                "it does not, save the file without it."
            )
    return statistics

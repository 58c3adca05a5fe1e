"""The latency estimator of the original scripts, read from its `best_latency_estimator.pt`."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..knobs import TIERS, KnobSetting
from .modeling_latency_estimator import LatencyEstimatorOutput


logger = logging.get_logger(__name__)

INPUTS = ("vision_tokens", "text_tokens", "tier_index", "top_k", "num_active_blocks")
"""What the configuration encoder reads, in this order. The tier's index is 0 for low, 1 for medium, 2 for high."""

_PARTS = ("config_encoder", "prefill_head", "position_encoder", "decode_head")
_ENCODERS = ("config_encoder", "position_encoder")

# What a checkpoint may hold beside the weights without a bearing on what they predict.
_BOOKKEEPING_KEYS = {
    *("epoch", "best_epoch", "step", "global_step", "seed", "timestamp"),
    *("optimizer_state_dict", "scheduler_state_dict", "lr_scheduler_state_dict", "scaler_state_dict"),
    *("loss", "train_loss", "val_loss", "best_loss", "best_val_loss", "best_metric", "history", "metrics"),
    *("train_losses", "val_losses", "train_metrics", "val_metrics", "test_metrics"),
}
_CONFIGURATION_KEYS = ("config", "model_config", "args", "hyperparameters")
_STATISTICS_KEYS = ("normalization", "normalization_stats", "stats")
_INPUT_STATISTICS = {"input_mean": "input_mean", "feature_mean": "input_mean"} | {
    "input_std": "input_std",
    "feature_std": "input_std",
}
_OUTPUT_STATISTICS = ("prefill_mean", "prefill_std", "decode_mean", "decode_std")
# Entries of a checkpoint's configuration that say how it was trained, not what it predicts.
_TRAINING_ENTRIES = {
    *(
        "batch_size",
        "dataset_names",
        "device",
        "dropout",
        "early_stopping",
        "epochs",
        "grad_clip",
        "learning_rate",
        "lr",
    ),
    *("max_epochs", "num_epochs", "num_workers", "output_dir", "patience", "results_dir", "seed", "val_split"),
    *("weight_decay",),
}


class OriginalLatencyEstimatorConfig(PreTrainedConfig):
    r"""
    Configuration of [`OriginalLatencyEstimatorModel`].

    Args:
        layers (`dict[str, list]`, *optional*):
            Layers of `config_encoder`, `prefill_head`, `position_encoder` and `decode_head`: `["linear", inputs,
            outputs]`, `["layer_norm", size]` or `["relu"]`.
        input_mean (`list[float]`, *optional*):
            Subtracted from the five inputs.
        input_std (`list[float]`, *optional*):
            What the five inputs are then divided by.
        prefill_mean, prefill_std, decode_mean, decode_std (`float`, *optional*, default to 0, 1, 0, 1):
            Scale of the two outputs.
    """

    model_type = "original_latency_estimator"

    layers: dict[str, list] | None = None
    input_mean: list[float] | None = None
    input_std: list[float] | None = None
    prefill_mean: float = 0.0
    prefill_std: float = 1.0
    decode_mean: float = 0.0
    decode_std: float = 1.0


class OriginalLatencyEstimatorModel(PreTrainedModel):
    """
    Predicts what a request costs at batch 1, by the network that the original scripts trained. Stands where a
    [`LatencyEstimatorModel`] does. Made by [`read_original_latency_estimator`].

    The original scripts count a decode step for every output token, so a request takes `prefill_ms` and the decode time
    at the positions 0 to `output_tokens - 1`.

    Args:
        config ([`OriginalLatencyEstimatorConfig`]):
            Its layers.
    """

    config_class = OriginalLatencyEstimatorConfig
    config: OriginalLatencyEstimatorConfig

    def __init__(self, config: OriginalLatencyEstimatorConfig):
        super().__init__(config)
        layers = config.layers or {}
        for part in _PARTS:
            self.add_module(part, nn.Sequential(*(_make_layer(*layer) for layer in layers.get(part, []))))
        self.requires_grad_(False)
        self.post_init()

    @torch.no_grad()
    def forward(
        self,
        vision_tokens: torch.Tensor,
        text_tokens: torch.Tensor,
        tier_index: torch.Tensor,
        top_k: torch.Tensor,
        num_blocks: torch.Tensor,
        position: torch.Tensor,
    ) -> LatencyEstimatorOutput:
        """
        Estimates for n requests.

        Args:
            vision_tokens, text_tokens (`torch.Tensor` of shape `(n,)`):
                Tokens of the image and of the rest of the prompt.
            tier_index (`torch.Tensor` of shape `(n,)`):
                0 for low, 1 for medium, 2 for high.
            top_k (`torch.Tensor` of shape `(n,)`):
                Experts per token.
            num_blocks (`torch.Tensor` of shape `(n,)`):
                Blocks that run.
            position (`torch.Tensor` of shape `(n,)`):
                Position among the output tokens, from 0, that the decode time is wanted at.

        Returns:
            [`LatencyEstimatorOutput`]: `prefill_ms` and `decode_ms_per_token`, in ms, of shape `(n,)`.
        """
        inputs = torch.stack([vision_tokens, text_tokens, tier_index, top_k, num_blocks], dim=-1).to(self.dtype)
        if self.config.input_mean is not None:
            inputs = inputs - inputs.new_tensor(self.config.input_mean)
        if self.config.input_std is not None:
            inputs = inputs / inputs.new_tensor(self.config.input_std)
        encoded = self.config_encoder(inputs)  # (n, size)
        encoded_position = self.position_encoder(torch.log(position.to(self.dtype) + 1)[:, None])
        prefill_ms = self.prefill_head(encoded)[:, 0]
        decode_ms = self.decode_head(torch.cat([encoded, encoded_position], dim=-1))[:, 0]
        return LatencyEstimatorOutput(
            prefill_ms=prefill_ms * self.config.prefill_std + self.config.prefill_mean,
            decode_ms_per_token=decode_ms * self.config.decode_std + self.config.decode_mean,
        )

    def predict_latency_ms(
        self,
        settings: Sequence[KnobSetting],
        num_views: Sequence[int] | torch.Tensor,
        vision_tokens: Sequence[int] | torch.Tensor,
        text_tokens: Sequence[int] | torch.Tensor,
        output_tokens: Sequence[int] | torch.Tensor,
    ) -> torch.Tensor:
        """
        Latency of whole requests.

        Args:
            settings (`Sequence[KnobSetting]`):
                Knob setting of each of the n requests.
            num_views (`Sequence[int]` or `torch.Tensor`):
                Not read: the network knows the tier instead.
            vision_tokens, text_tokens, output_tokens (`Sequence[int]` or `torch.Tensor`):
                Token counts, n each.

        Returns:
            `torch.Tensor` of shape (n,): milliseconds, float32.

        Raises:
            ValueError: If the arguments' lengths differ, an answer has no token, or what the network gives is no time.
        """
        counts = {"vision_tokens": vision_tokens, "text_tokens": text_tokens, "output_tokens": output_tokens}
        counts = {name: torch.as_tensor(values, device=self.device) for name, values in counts.items()}
        for name, values in counts.items():
            if values.shape != (len(settings),):
                raise ValueError(
                    f"`{name}` has the shape {tuple(values.shape)} but there are {len(settings)} settings: give one "
                    "value a setting."
                )
        output_tokens = counts.pop("output_tokens")
        if (output_tokens < 1).any():
            raise ValueError(
                f"`output_tokens` holds {int(output_tokens.min())}: an answer has 1 token at least, its end of sequence."
            )
        knobs = {
            "tier_index": [TIERS.index(setting.tier) for setting in settings],
            "top_k": [setting.top_k for setting in settings],
            "num_blocks": [setting.num_blocks for setting in settings],
        }
        counts.update({name: torch.tensor(values, device=self.device) for name, values in knobs.items()})
        # One row for each request and position.
        request = torch.repeat_interleave(output_tokens)
        first_row = output_tokens.cumsum(0) - output_tokens
        position = torch.arange(len(request), device=self.device) - first_row[request]
        estimate = self(**{name: values[request] for name, values in counts.items()}, position=position)
        latency_ms = estimate.prefill_ms[first_row].index_add(0, request, estimate.decode_ms_per_token)
        if not (latency_ms > 0).all():
            row = int(latency_ms.argmin())
            raise ValueError(
                f"the original latency estimator gives {latency_ms[row]:.3f} ms for a request at {settings[row]}, which is no "
                "time: its file may lack the statistics that its inputs or outputs were scaled by."
            )
        return latency_ms

    def check_executor(self, config: PreTrainedConfig):
        """Warns: the original scripts do not say which executor they measured, so nothing can be checked."""
        logger.warning(
            "the original latency estimator does not say which executor it is of: make sure that it is this one."
        )


def read_original_latency_estimator(path: str | Path) -> OriginalLatencyEstimatorModel:
    """
    Reads `best_latency_estimator.pt`, as the original scripts saved it, without unpickling any object. Sizes follow from
    the shapes of the weights: a matrix is a linear layer, a vector alone is a layer norm. Activations leave no trace in a
    state dict: a ReLU is taken to follow each layer norm, and each linear layer that no layer norm follows, but for the
    last layer of a head.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        [`OriginalLatencyEstimatorModel`]

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
        raise ValueError(f"'{path}' is not a dict with a `model_state_dict`: it is no original latency estimator.")
    state = {
        name.removeprefix("module."): tensor.float() for name, tensor in checkpoint.pop("model_state_dict").items()
    }
    layers, renamed = _infer_layers(state, path)
    config = OriginalLatencyEstimatorConfig(layers=layers, **_read_statistics(checkpoint, layers, path))
    model = OriginalLatencyEstimatorModel(config)
    model.load_state_dict(renamed)
    return model.eval()


def _make_layer(kind: str, *sizes: int) -> nn.Module:
    return {"linear": nn.Linear, "layer_norm": nn.LayerNorm, "relu": nn.ReLU}[kind](*sizes)


def _infer_layers(state: Mapping[str, torch.Tensor], path: Path) -> tuple[dict[str, list], dict[str, torch.Tensor]]:
    """Layers of each part, and the weights under the names that they have there."""
    weights: dict[str, dict[int, dict[str, torch.Tensor]]] = {part: {} for part in _PARTS}
    for name, tensor in state.items():
        match = re.fullmatch(r"(\w+)\.(\d+)\.(weight|bias)", name)
        if match is None or match[1] not in weights:
            raise ValueError(
                f"'{path}' has the weight '{name}', which is not understood: parts are {', '.join(_PARTS)}."
            )
        weights[match[1]].setdefault(int(match[2]), {})[match[3]] = tensor
    layers: dict[str, list] = {}
    renamed: dict[str, torch.Tensor] = {}
    for part in _PARTS:
        of_part = [weights[part][index] for index in sorted(weights[part])]
        if not of_part or any(set(layer) != {"weight", "bias"} for layer in of_part):
            raise ValueError(f"'{path}' lacks weights or biases of '{part}': it is incomplete.")
        layers[part] = []
        for position, layer in enumerate(of_part):
            renamed.update({f"{part}.{len(layers[part])}.{name}": tensor for name, tensor in layer.items()})
            is_linear = layer["weight"].dim() == 2
            sizes = list(layer["weight"].shape)
            layers[part].append(["linear", sizes[1], sizes[0]] if is_linear else ["layer_norm", sizes[0]])
            is_last = position == len(of_part) - 1
            norm_follows = not is_last and of_part[position + 1]["weight"].dim() == 1
            if not norm_follows and (not is_last or part in _ENCODERS):
                layers[part].append(["relu"])
    _check_sizes(layers, path)
    return layers, renamed


def _check_sizes(layers: Mapping[str, list], path: Path):
    def size_after(part: str, size: int) -> int:
        for kind, *sizes in layers[part]:
            if sizes and sizes[0] != size:
                raise ValueError(f"'{path}', '{part}': a layer takes {sizes[0]} values, but is given {size}.")
            size = sizes[-1] if kind == "linear" else size
        return size

    encoded = size_after("config_encoder", len(INPUTS))
    for part, size in (
        ("prefill_head", encoded),
        ("decode_head", encoded + size_after("position_encoder", 1)),
    ):
        if size_after(part, size) != 1:
            raise ValueError(f"'{path}', '{part}': it gives {size_after(part, size)} values where a time is one.")


def _read_statistics(checkpoint: Mapping[str, Any], layers: Mapping[str, list], path: Path) -> dict[str, Any]:
    """What the checkpoint says about the scale of inputs and outputs. Refuses what is not understood."""
    statistics: dict[str, Any] = {}
    entries = dict(checkpoint)
    for key in _STATISTICS_KEYS:
        entries.update(entries.pop(key, None) or {})
    for key, value in entries.items():
        if key in _BOOKKEEPING_KEYS:
            continue
        if key in _CONFIGURATION_KEYS:
            _check_configuration(value or {}, layers, path)
        elif key in _INPUT_STATISTICS:
            values = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
            if len(values) != len(INPUTS):
                raise ValueError(f"'{path}', '{key}': it has {len(values)} values for {len(INPUTS)} inputs.")
            statistics[_INPUT_STATISTICS[key]] = values
        elif key in _OUTPUT_STATISTICS:
            statistics[key] = float(value)
        else:
            raise ValueError(
                f"'{path}' holds '{key}', which is not understood and may change what is predicted: if it does not, save the "
                "file without it."
            )
    return statistics


def _check_configuration(configuration: Mapping[str, Any], layers: Mapping[str, list], path: Path):
    hidden_sizes = {sizes[1] for kind, *sizes in layers["config_encoder"] if kind == "linear"}
    for name, value in configuration.items():
        if name in ("hidden_dim", "hidden_size") and value not in hidden_sizes:
            raise ValueError(f"'{path}' says `{name}` {value}, but its layers are {sorted(hidden_sizes)} wide.")
        if name in ("hidden_dim", "hidden_size", "num_layers", "input_dim", *_TRAINING_ENTRIES):
            continue
        if name == "activation" and str(value).lower() == "relu":
            continue
        raise ValueError(
            f"'{path}' has `{name}` {value!r} in its configuration, which is not understood and may change what is "
            "predicted: if it does not, save the file without it."
        )

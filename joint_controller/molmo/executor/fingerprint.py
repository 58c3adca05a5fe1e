"""Digests of a model, for fingerprints."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from .. import MolmoForConditionalGeneration


# Parts of a configuration that no answer depends on. The precision is that of the tensors, the knob space that of the
# executor.
_IGNORED = ("_name_or_path", "architectures", "dtype", "knob_space", "transformers_version")


def digest_of(parts: Mapping[str, Any]) -> str:
    """SHA-256 of named parts, whatever their order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def model_digest(model: MolmoForConditionalGeneration) -> str:
    """SHA-256 of a model's architecture and weights."""
    architecture = _architecture(model.config.to_dict())
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _architecture(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _IGNORED
    }

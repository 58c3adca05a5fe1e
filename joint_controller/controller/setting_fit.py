"""Which settings fit the budgets of requests: what a controller may choose from, and how much time each would leave."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SettingFit:
    r"""
    Which settings fit the budgets of n requests, as predicted before anything was run.

    Args:
        fits (`torch.BoolTensor` of shape `(n, settings)`):
            Settings to choose from, at least one for each request, in the order of the knob space.
        slack (`torch.Tensor` of shape `(n, settings)`):
            Share of the budget that each setting is predicted to leave: \\(1 - l / b\\), from -1 (it takes twice the budget, or
            more) to 1.
        fits_budget (`torch.BoolTensor` of shape `(n,)`):
            Whether any setting fits. Where none does, `fits` has the cheapest one.
    """

    fits: torch.Tensor
    slack: torch.Tensor
    fits_budget: torch.Tensor

    @classmethod
    def of(
        cls, latency_ms: torch.Tensor, latency_budget_ms: torch.Tensor | float, is_masked: bool = True
    ) -> "SettingFit":
        """
        Compares predicted latencies with budgets.

        Args:
            latency_ms (`torch.Tensor` of shape `(n, settings)`):
                What each setting is predicted to take, in ms; infinite where it cannot be run.
            latency_budget_ms (`torch.Tensor` of shape `(n,)` or `float`):
                Budgets, in ms.
            is_masked (`bool`, *optional*, defaults to `True`):
                Whether settings that do not fit are out. Otherwise only those are that cannot be run.
        """
        if isinstance(latency_budget_ms, torch.Tensor):
            latency_budget_ms = latency_budget_ms[:, None]
        fits = latency_ms <= latency_budget_ms
        fits_budget = fits.any(dim=1)
        if not is_masked:
            fits = latency_ms.isfinite()
        # The cheapest setting is the first.
        fits[:, 0] |= ~fits.any(dim=1)
        return cls(fits, (1.0 - latency_ms / latency_budget_ms).clamp_(-1.0, 1.0), fits_budget)

    def to(self, device: torch.device) -> "SettingFit":
        """The same on a device."""
        return SettingFit(self.fits.to(device), self.slack.to(device), self.fits_budget.to(device))

    def of_one(self) -> "RequestFit":
        """That of the only request."""
        [fits], [slack], [fits_budget] = self.fits.tolist(), self.slack.tolist(), self.fits_budget.tolist()
        return RequestFit(fits, slack, fits_budget)


@dataclass(frozen=True)
class RequestFit:
    """
    A [`SettingFit`] of one request, in plain numbers.

    Args:
        fits (`list[bool]`), slack (`list[float]`), fits_budget (`bool`):
            As in [`SettingFit`].
    """

    fits: list[bool]
    slack: list[float]
    fits_budget: bool

    @classmethod
    def of(cls, latency_ms: Sequence[float], latency_budget_ms: float, is_masked: bool = True) -> "RequestFit":
        """As [`SettingFit.of`]."""
        fits = [ms <= latency_budget_ms for ms in latency_ms]
        fits_budget = any(fits)
        if not is_masked:
            fits = [math.isfinite(ms) for ms in latency_ms]
        fits[0] |= not any(fits)
        return cls(fits, [max(-1.0, min(1.0, 1.0 - ms / latency_budget_ms)) for ms in latency_ms], fits_budget)

"""What a whole request costs: the stages that a family of executors has, and those that every request has."""

import operator
from collections.abc import Mapping
from functools import cached_property, reduce

import torch

from ..executor import (
    CONTROLLER,
    LATENCY_SCOPES,
    OVERHEAD,
    REQUEST_SCOPE,
    CostModel,
    StageCost,
    StageTerms,
)


class RequestCosts:
    """
    The stages that the latency of a request is the sum of, and what they are explained by: in the interface of a
    [`~executor.CostModel`], those of the family in a latency scope, and in whole requests those that are no family's.

    Args:
        cost_model ([`~executor.CostModel`]):
            That of the executor.
        latency_scope (`str`, *optional*, defaults to `"request"`):
            What counts, see `LATENCY_SCOPES`.

    Attributes:
        stages (`dict[str, StageCost]`):
            The stages in scope, in order.
        knob_names (`tuple[str, ...]`):
            As in [`~executor.CostModel`].

    Raises:
        ValueError: If there is no such scope, or the cost model counts no tokens.
    """

    def __init__(self, cost_model: CostModel, latency_scope: str = REQUEST_SCOPE):
        check_latency_scope(latency_scope)
        self.cost_model = cost_model
        self.latency_scope = latency_scope
        self.knob_names = cost_model.knob_names
        self.token_names = tuple(name for name in cost_model.count_names if name.endswith("_tokens"))
        if not self.token_names:
            raise ValueError(
                f"the cost model counts {', '.join(cost_model.count_names)}, but no tokens: counts whose names end in "
                "`_tokens` add up to the length of the prompt."
            )
        self.stages: dict[str, StageCost] = {}
        if latency_scope == REQUEST_SCOPE:
            self.stages[OVERHEAD] = StageCost(("constant", "tokens"), ("tokens",), REQUEST_SCOPE)
            self.stages[CONTROLLER] = StageCost(("constant",), ("tokens",), REQUEST_SCOPE)
        self.stages |= {
            stage: cost for stage, cost in cost_model.stages.items() if latency_scope in (REQUEST_SCOPE, cost.scope)
        }

    @cached_property
    def count_names(self) -> tuple[str, ...]:
        """The family's counts that the stages in scope look at."""
        looked_at = set().union(*map(self.looked_at, self.stages))
        return tuple(name for name in self.cost_model.count_names if name in looked_at)

    def looked_at(self, stage: str) -> set[str]:
        """Names of the columns that a stage looks at."""
        names = set()

        class Columns(dict):
            def __missing__(self, name: str) -> torch.Tensor:
                names.add(name)
                return torch.ones(1)

        self.terms(stage, Columns())
        return names

    def summands(self, stage: str) -> dict[str, int]:
        """Columns that are a feature of the stage each, and otherwise not looked at; and which feature."""
        names, found = self.looked_at(stage), {}
        for name in names:
            one = object()  # nothing can be done to it but hand it on
            try:
                terms = self.terms(stage, {**dict.fromkeys(names, torch.ones(1)), name: one})
            except (TypeError, AttributeError):
                continue
            if [feature is one for feature in terms.features].count(True) == 1 and one not in terms.inputs:
                found[name] = terms.features.index(one)
        return found

    def terms(self, stage: str, columns: Mapping[str, torch.Tensor]) -> StageTerms:
        """
        As [`~executor.CostModel.terms`]. Counts that the stage does not look at may be missing.

        Raises:
            ValueError: If a column is missing that it looks at.
        """
        try:
            if stage not in (OVERHEAD, CONTROLLER):
                return self.cost_model.terms(stage, columns)
            tokens = reduce(operator.add, [columns[name] for name in self.token_names])
        except KeyError as error:
            other = ", or leave the stage out with `--latency_scope model`"
            raise ValueError(
                f"`{error.args[0]}` is missing, which the stage '{stage}' depends on: give it"
                f"{other if self.stages[stage].scope == REQUEST_SCOPE else ''}."
            ) from error
        constant = torch.ones_like(tokens)
        return StageTerms((constant, tokens) if stage == OVERHEAD else (constant,), (tokens,))


def check_latency_scope(latency_scope: str) -> None:
    """Refuses (`ValueError`) what is no latency scope."""
    if latency_scope not in LATENCY_SCOPES:
        raise ValueError(f"`latency_scope` is '{latency_scope}': choose from {', '.join(map(repr, LATENCY_SCOPES))}.")

"""Stages and counts of both scopes."""

import pytest
import torch

from joint_controller.executor import StageCost, StageTerms
from joint_controller.latency.request_costs import RequestCosts
from joint_controller.molmo.costs import MolmoCostModel


@pytest.mark.parametrize(
    ("scope", "stages", "counts"),
    [
        (
            "request",
            ["overhead", "controller", "image_processing", "vision", "llm_prefill", "decode"],
            ("image_pixels", "num_views", "vision_tokens", "text_tokens"),
        ),
        ("model", ["vision", "llm_prefill", "decode"], ("num_views", "vision_tokens", "text_tokens")),
    ],
)
def test_stages_and_the_counts_that_they_look_at(scope, stages, counts):
    costs = RequestCosts(MolmoCostModel(None, [64, 128]), scope)
    assert list(costs.stages) == stages and costs.count_names == counts
    assert costs.knob_names == ("top_k", "num_blocks")
    for stage, cost in costs.stages.items():
        columns = {name: torch.ones(3) for name in (*counts, *costs.knob_names, "output_tokens")}
        terms = costs.terms(stage, columns)
        assert (len(terms.features), len(terms.inputs)) == (len(cost.features), len(cost.inputs))


def test_overhead_is_explained_by_the_length_of_the_prompt():
    columns = {"vision_tokens": torch.tensor([3.0, 5.0]), "text_tokens": torch.tensor([10.0, 20.0])}
    costs = RequestCosts(MolmoCostModel(None, None))
    overhead, controller = costs.terms("overhead", columns), costs.terms("controller", columns)
    assert [values.tolist() for values in overhead.features] == [[1, 1], [13, 25]]
    assert [values.tolist() for values in controller.features] == [[1, 1]]
    for terms in (overhead, controller):
        assert [values.tolist() for values in terms.inputs] == [[13, 25]]


def test_summands_are_looked_at_as_a_feature_alone():
    costs = RequestCosts(MolmoCostModel(None, [64, 128]))
    assert costs.looked_at("image_processing") == {"image_pixels", "num_views"}
    assert costs.looked_at("decode") == {"vision_tokens", "text_tokens", "top_k", "num_blocks", "output_tokens"}
    # Views are a feature, too, but the learned factor sees them.
    assert costs.summands("image_processing") == {"image_pixels": 1}
    assert [costs.summands(stage) for stage in ("vision", "llm_prefill", "overhead")] == [{}, {}, {}]

    class Plain:
        """Each count is used otherwise as well: in another feature, twice, in an input, in arithmetic."""

        count_names = ("pixels", "ink_tokens", "colors", "tokens", "pages")
        knob_names = ()
        stages = {"decode": StageCost(tuple("abcdefg"), ("ink",))}

        def terms(self, stage, columns):
            pixels, ink, colors, tokens, pages = (columns[name] for name in self.count_names)
            return StageTerms((ink, pixels, pixels, colors, tokens.clamp(min=3), pages, 2 * pages), (ink,))

    assert RequestCosts(Plain(), "model").summands("decode") == {"colors": 3}


def test_a_count_is_missing_where_a_stage_looks_at_it():
    columns = {"num_views": torch.ones(1)}
    costs = RequestCosts(MolmoCostModel(None, None))
    assert costs.terms("vision", columns).inputs == (columns["num_views"],)
    message = "`image_pixels` is missing, which the stage 'image_processing' depends on: give it, or .* model`"
    with pytest.raises(ValueError, match=message):
        costs.terms("image_processing", columns)
    with pytest.raises(ValueError, match="`vision_tokens` is missing, which the stage 'decode' depends on: give it.$"):
        RequestCosts(MolmoCostModel(None, None), "model").terms("decode", columns)


def test_costs_without_tokens_are_refused():
    class Wordless:
        count_names = ("pixels",)
        knob_names = ()
        stages = {"decode": StageCost(("constant",), ("pixels",))}

        def terms(self, stage, columns):
            return StageTerms((columns["pixels"],), (columns["pixels"],))

    with pytest.raises(ValueError, match="the cost model counts pixels, but no tokens"):
        RequestCosts(Wordless())

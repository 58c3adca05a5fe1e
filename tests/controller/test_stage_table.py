"""The choices of the stages, and their probabilities knob by knob, against the enumeration of every combination of values."""

import itertools

import pytest
import torch

from joint_controller import Knob, KnobSpace
from joint_controller.controller import StageTable, knob_log_probs
from joint_controller.controller.modeling_joint_controller import MASKED_SCORE


# Two knobs of stage 1 and two of stage 2, in mixed order.
MIXED = KnobSpace(
    [
        Knob("depth", (4, 8), stage=2),
        Knob("resolution", (1, 2, 3), stage=1),
        Knob("threshold", (0.1, 0.2, 0.3, 0.4), stage=2),
        Knob("palette", ("gray", "color"), stage=1),
    ]
)
ONLY_SECOND = KnobSpace([Knob("depth", (4, 8, 12), stage=2)])


@pytest.mark.parametrize("space", [MIXED, ONLY_SECOND], ids=["four mixed", "only second"])
def test_every_pair_of_choices_is_one_setting(space):
    table = StageTable(space)
    stages = [space.decided_by(stage) for stage in (1, 2)]
    choices = [list(itertools.product(*(range(space.sizes[knob]) for knob in knobs))) for knobs in stages]
    assert table.num_choices == tuple(map(len, choices)) and table.positions.shape == table.num_choices
    assert [values.tolist() for values in table.values] == [[list(one) for one in of_stage] for of_stage in choices]
    for first, second in itertools.product(*(range(num) for num in table.num_choices)):
        setting = space.settings[table.positions[first, second]]
        for knobs, values in zip(stages, (choices[0][first], choices[1][second]), strict=True):
            assert tuple(space.indices(setting)[knob] for knob in knobs) == values
    assert [tuple(row) for row in table.setting_values.tolist()] == [space.indices(setting) for setting in space]
    for values, setting in zip(choices[0], table.settings_of_first, strict=True):
        indices = space.indices(setting)
        assert tuple(indices[knob] for knob in stages[0]) == values and not any(indices[knob] for knob in stages[1])


def enumerate_by_hand(log_probs, sizes, values):
    """Of one row: of each knob, the log-probability of its value given those before, and the entropy of that distribution."""
    probs = {choice: p.exp() for choice, p in zip(itertools.product(*map(range, sizes)), log_probs, strict=True)}

    def total(beginning):
        return sum(p for choice, p in probs.items() if choice[: len(beginning)] == beginning)

    taken, entropies = [], []
    for knob, size in enumerate(sizes):
        before = tuple(values[:knob])
        given = torch.stack([total((*before, value)) / total(before) for value in range(size)])
        taken.append(given[values[knob]].log())
        entropies.append(-sum(p * p.log() for p in given if p > 0))
    return taken, entropies


@pytest.mark.parametrize("sizes", [(4,), (3, 2), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("share_out", [0.0, 0.5])
def test_knobs_share_the_probability_of_a_choice_by_the_chain_rule(sizes, share_out):
    generator = torch.Generator().manual_seed(len(sizes))
    choices = torch.tensor(list(itertools.product(*map(range, sizes))))
    num = len(choices)
    scores = 2 * torch.randn(30, num, generator=generator, dtype=torch.float64)
    is_out = torch.rand(30, num, generator=generator) < share_out
    # One choice that is not out is taken in each row, all of them in turn.
    taken = torch.arange(30) % num
    is_out[torch.arange(30), taken] = False
    assert is_out.any() == (share_out > 0)
    log_probs = scores.masked_fill(is_out, MASKED_SCORE).log_softmax(-1)
    found, entropies = knob_log_probs(log_probs, sizes, choices[taken])
    torch.testing.assert_close(sum(found), log_probs[torch.arange(30), taken])
    for row in range(30):
        expected = enumerate_by_hand(log_probs[row], sizes, choices[taken[row]].tolist())
        torch.testing.assert_close([one[row] for one in found], expected[0])
        torch.testing.assert_close([one[row] for one in entropies], expected[1])


def test_gradients_are_finite_where_all_but_one_choice_is_out():
    """Also in float32, where whole groups of choices are out: those of a value that was not taken, and beside it."""
    sizes, values = (3, 2), torch.tensor([[0, 1], [2, 0]])
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    is_out = torch.ones(2, 6, dtype=torch.bool)
    is_out[0, 1] = is_out[1, 4] = is_out[1, 2] = False
    log_probs = scores.masked_fill(is_out, MASKED_SCORE).log_softmax(-1)
    taken, entropies = knob_log_probs(log_probs, sizes, values)
    assert [one[0].item() for one in (*taken, *entropies)] == pytest.approx([0.0] * 4, abs=1e-6)
    assert entropies[0][1] > 0 and entropies[1][1].item() == pytest.approx(0.0, abs=1e-6)
    (sum(taken) + sum(entropies)).sum().backward()
    assert scores.grad.isfinite().all()
    assert (scores.grad[is_out] == 0).all() and (scores.grad[1, [2, 4]] != 0).all()


def test_a_stage_without_knobs_decides_nothing():
    taken, entropies = knob_log_probs(torch.zeros(3, 1), (), torch.empty(3, 0, dtype=torch.long))
    assert taken == entropies == []

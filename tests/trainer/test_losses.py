"""Losses over all settings against sums setting by setting, finite differences and sampled gradients."""

import math

import pytest
import torch

from joint_controller.controller.modeling_joint_controller import MASKED_SCORE
from joint_controller.trainer.losses import EXACT_LOSSES, expected_loss, regression_loss, supervised_loss


NUM_FIRST, NUM_SECOND = 3, 4


def make_inputs(num=5, is_masked=True, seed=0):
    """Scores as a controller gives them, and random rewards; of one sample a whole choice of stage 1 is out."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num, NUM_FIRST, NUM_SECOND)
    stage1 = torch.randn(num, NUM_FIRST, generator=generator, dtype=torch.float64)
    stage2 = torch.randn(shape, generator=generator, dtype=torch.float64)
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    latency_ms = torch.rand(shape, generator=generator, dtype=torch.float64)
    allowed = torch.ones(shape, dtype=torch.bool)
    if is_masked:
        allowed = torch.rand(shape, generator=generator) < 0.6
        allowed[0, 1] = False
        allowed[1:, 0, 0] = True
        allowed[0, 2, 3] = True
        # As settings have that are never chosen, which nobody answered.
        rewards, latency_ms = rewards.where(allowed, -torch.inf), latency_ms.where(allowed, torch.inf)
    return stage1, stage2, rewards, latency_ms, allowed


def masked(stage1, stage2, allowed):
    """As a controller masks its scores."""
    return stage1.masked_fill(~allowed.any(-1), MASKED_SCORE), stage2.masked_fill(~allowed, MASKED_SCORE)


def probability_by_hand(stage1, stage2, allowed) -> dict[tuple[int, int], float]:
    """Of one sample, the probability of each setting that is allowed, with softmaxes written out."""
    firsts = [first for first in range(NUM_FIRST) if any(allowed[first])]
    of_first = {first: math.exp(stage1[first]) for first in firsts}
    probs = {}
    for first in firsts:
        seconds = {second: math.exp(stage2[first][second]) for second in range(NUM_SECOND) if allowed[first][second]}
        for second, weight in seconds.items():
            share = of_first[first] / sum(of_first.values())
            probs[first, second] = share * weight / sum(seconds.values())
    return probs


def expected_loss_by_hand(stage1, stage2, rewards, allowed, entropy_coef) -> float:
    total = 0.0
    for row in range(len(rewards)):
        probs = probability_by_hand(stage1[row].tolist(), stage2[row].tolist(), allowed[row].tolist())
        total += sum(p * rewards[row][setting].item() for setting, p in probs.items())
        total -= entropy_coef * sum(p * math.log(p) for p in probs.values())
    return -total / len(rewards)


def gradients(loss, *scores):
    scores = [one.clone().requires_grad_() for one in scores]
    value, probs = loss(*scores)
    value.backward()
    return value.item(), probs.detach(), [one.grad for one in scores]


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_the_expected_reward_and_its_gradient_are_sums_over_all_settings(is_masked, entropy_coef):
    stage1, stage2, rewards, latency_ms, allowed = make_inputs(is_masked=is_masked)
    value, probs, found = gradients(
        lambda *scores: expected_loss(*masked(*scores, allowed), rewards, latency_ms, allowed, entropy_coef),
        stage1,
        stage2,
    )
    assert value == pytest.approx(expected_loss_by_hand(stage1, stage2, rewards, allowed, entropy_coef))
    for row in range(len(rewards)):
        by_hand = probability_by_hand(stage1[row].tolist(), stage2[row].tolist(), allowed[row].tolist())
        expected = torch.zeros(NUM_FIRST, NUM_SECOND, dtype=torch.float64)
        for setting, p in by_hand.items():
            expected[setting] = p
        torch.testing.assert_close(probs[row], expected)
    # The gradient, by differences of the sum.
    step = 1e-5
    for number, scores in enumerate((stage1, stage2)):
        for index in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
            values = []
            for sign in (1, -1):
                moved = [stage1.clone(), stage2.clone()]
                moved[number][tuple(index)] += sign * step
                values.append(expected_loss_by_hand(*moved, rewards, allowed, entropy_coef))
            difference = (values[0] - values[1]) / (2 * step)
            assert found[number][tuple(index)].item() == pytest.approx(difference, abs=1e-8)


@pytest.mark.parametrize("is_masked", [False, True])
def test_sampled_policy_gradients_are_on_average_that_of_the_expected_reward(is_masked):
    """What GRPO estimates (REINFORCE without a baseline), from many samples of one sample's settings."""
    stage1, stage2, rewards, latency_ms, allowed = make_inputs(num=1, is_masked=is_masked, seed=4)
    _, probs, exact = gradients(
        lambda *scores: expected_loss(*masked(*scores, allowed), rewards, latency_ms, allowed, 0.0), stage1, stage2
    )
    num = 200_000
    taken = probs.flatten().multinomial(num, replacement=True, generator=torch.Generator().manual_seed(1))
    first, second = taken // NUM_SECOND, taken % NUM_SECOND
    reward = rewards[0, first, second]
    of_first, of_second = (one.softmax(-1)[0] for one in masked(stage1, stage2, allowed))
    # The gradient of the log-probability of what was taken: one where it was taken, less the probability.
    grad1 = torch.nn.functional.one_hot(first, NUM_FIRST) - of_first
    grad2 = torch.zeros(num, NUM_FIRST, NUM_SECOND, dtype=torch.float64)
    grad2[torch.arange(num), first] = torch.nn.functional.one_hot(second, NUM_SECOND) - of_second[first]
    for sampled, gradient in ((grad1, exact[0][0]), (grad2, exact[1][0])):
        estimates = -sampled * reward.reshape(num, *[1] * (sampled.dim() - 1))
        error = estimates.std(0) / num**0.5
        assert gradient.abs().max() > 10 * error.max()
        assert ((estimates.mean(0) - gradient).abs() <= 4.5 * error + 1e-12).all()


def test_supervised_is_the_cross_entropy_to_the_best_setting_that_is_allowed():
    stage1, stage2, rewards, latency_ms, allowed = make_inputs()
    value, probs, (grad1, grad2) = gradients(
        lambda *scores: supervised_loss(*masked(*scores, allowed), rewards, latency_ms, allowed, 0.3), stage1, stage2
    )
    logs, bests = [], []
    for row in range(len(rewards)):
        by_hand = probability_by_hand(stage1[row].tolist(), stage2[row].tolist(), allowed[row].tolist())
        best = max(by_hand, key=lambda setting: rewards[row][setting].item())
        logs.append(math.log(by_hand[best]))
        bests.append(best)
        assert probs[row].sum().item() == pytest.approx(1) and probs[row][best].item() == pytest.approx(by_hand[best])
    assert value == pytest.approx(-sum(logs) / len(logs))
    # Downhill is towards the best setting alone.
    for row, (first, second) in enumerate(bests):
        assert (grad1[row] < 0).nonzero().flatten().tolist() in ([first], [])
        assert (grad2[row] < 0).nonzero().tolist() in ([[first, second]], [])
    assert grad1.isfinite().all() and grad2.isfinite().all()


def test_supervised_takes_the_fastest_of_equals():
    rewards = torch.zeros(1, NUM_FIRST, NUM_SECOND)
    rewards[0, 0, 1] = rewards[0, 1, 2] = rewards[0, 2, 3] = 1.0
    latency_ms = torch.full_like(rewards, 1.0)
    latency_ms[0, 0, 1], latency_ms[0, 1, 2], latency_ms[0, 2, 3] = 7.0, 5.0, 6.0
    scores = torch.zeros(1, NUM_FIRST), torch.zeros(1, NUM_FIRST, NUM_SECOND)

    def best(allowed):
        gradient = gradients(lambda *given: supervised_loss(*given, rewards, latency_ms, allowed, 0.0), *scores)[2][1]
        return (gradient < 0).nonzero().tolist()

    allowed = torch.ones_like(rewards, dtype=torch.bool)
    assert best(allowed) == [[0, 1, 2]]
    allowed[0, 1, 2] = False
    assert best(allowed) == [[0, 2, 3]]


def test_regression_is_the_squared_error_of_what_is_allowed_a_mean_for_each_sample():
    stage1, stage2, rewards, latency_ms, allowed = make_inputs()
    value, probs, _ = gradients(
        lambda *scores: regression_loss(*masked(*scores, allowed), rewards, latency_ms, allowed, 0.3), stage1, stage2
    )
    means = []
    for row in range(len(rewards)):
        taken, errors = {}, {1: [], 2: []}
        for first in range(NUM_FIRST):
            left = [second for second in range(NUM_SECOND) if allowed[row, first, second]]
            errors[2] += [(stage2[row, first, second] - rewards[row, first, second]).item() ** 2 for second in left]
            if left:
                taken[first] = max(left, key=lambda second: stage2[row, first, second].item())
                errors[1].append((stage1[row, first] - rewards[row, first, taken[first]]).item() ** 2)
        first = max(taken, key=lambda one: stage1[row, one].item())
        assert probs[row].nonzero().tolist() == [[first, taken[first]]] and probs[row].sum() == 1
        means.append(sum(errors[1]) / len(errors[1]) + sum(errors[2]) / len(errors[2]))
    assert value == pytest.approx(sum(means) / len(means))


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("loss", ["supervised", "regression"])
def test_at_its_minimum_the_highest_score_is_that_of_the_best_setting(loss, is_masked):
    """Scores of each sample that can be anything, trained for long."""
    stage1, stage2, rewards, latency_ms, allowed = make_inputs(is_masked=is_masked, num=8)
    scores = [torch.zeros_like(one).requires_grad_() for one in (stage1, stage2)]
    optimizer = torch.optim.Adam(scores, lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        value, probs = EXACT_LOSSES[loss](*masked(*scores, allowed), rewards, latency_ms, allowed, 0.0)
        value.backward()
        assert all(one.grad.isfinite().all() for one in scores)
        optimizer.step()
    best = rewards.masked_fill(~allowed, -torch.inf).flatten(1).argmax(1)
    found = [one.detach() for one in masked(*scores, allowed)]
    first = found[0].argmax(-1)
    second = found[1][torch.arange(8), first].argmax(-1)
    assert torch.equal(first * NUM_SECOND + second, best)
    assert torch.equal(probs.flatten(1).argmax(1), best)
    if loss == "regression":
        torch.testing.assert_close(found[1][allowed], rewards[allowed], atol=1e-2, rtol=0)
        is_left = allowed.any(-1)
        highest = rewards.masked_fill(~allowed, -torch.inf).amax(-1)
        torch.testing.assert_close(found[0][is_left], highest[is_left], atol=1e-2, rtol=0)
        assert value.item() < 1e-3


@pytest.mark.parametrize("is_masked", [False, True])
def test_at_the_minimum_of_the_expected_loss_probabilities_are_those_of_a_softmax_of_rewards(is_masked):
    """With an entropy bonus of weight t, the best policy is exp(R / t) over its sum, and is worth t times the sum's logarithm."""
    stage1, stage2, rewards, latency_ms, allowed = make_inputs(is_masked=is_masked, num=8)
    weight = 0.5
    scores = [torch.zeros_like(one).requires_grad_() for one in (stage1, stage2)]
    optimizer = torch.optim.Adam(scores, lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        value, probs = expected_loss(*masked(*scores, allowed), rewards, latency_ms, allowed, weight)
        value.backward()
        optimizer.step()
    worth = (rewards.masked_fill(~allowed, -torch.inf) / weight).flatten(1)
    torch.testing.assert_close(probs.flatten(1), worth.softmax(1), atol=2e-3, rtol=0)
    assert value.item() == pytest.approx(-weight * worth.logsumexp(1).mean().item(), abs=1e-4)

"""The original scripts' estimator, read from files that the network below writes as they did."""

import logging
import math

import pytest
import torch
from torch import nn

from joint_controller import KnobSetting
from joint_controller.latency import read_latency_estimator
from joint_controller.original_scripts import OriginalLatencyEstimatorModel
from joint_controller.outcomes import Outcome


class OriginalNetwork(nn.Module):
    """Layers as the original scripts stack them; dropout leaves gaps in the numbers, like activations."""

    def __init__(self, hidden=12, num_layers=2, position=4):
        super().__init__()
        layers = []
        for size in (5, *[hidden] * (num_layers - 1)):
            layers += [nn.Linear(size, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(0.5)]
        self.config_encoder = nn.Sequential(*layers)
        self.prefill_head = nn.Sequential(nn.Linear(hidden, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 1))
        self.position_encoder = nn.Sequential(nn.Linear(1, position), nn.ReLU())
        self.decode_head = nn.Sequential(nn.Linear(hidden + position, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, inputs, position):
        encoded = self.config_encoder(inputs)
        encoded_position = self.position_encoder(torch.log(torch.tensor([[position + 1.0]])))
        decode = self.decode_head(torch.cat([encoded, encoded_position], dim=-1))
        return self.prefill_head(encoded).item(), decode.item()


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = OriginalNetwork().eval()
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if name in ("prefill_head.3.bias", "decode_head.2.bias"):
            nn.init.constant_(parameter, 20.0)  # times are positive
    return network


def save(path, network, **entries):
    torch.save({"model_state_dict": network.state_dict(), **entries}, path)
    return path


SETTINGS = [
    KnobSetting(tier="low", top_k=4, num_blocks=12),
    KnobSetting(tier="high", top_k=8, num_blocks=16),
    KnobSetting(tier="medium", top_k=6, num_blocks=14),
]
COUNTS = {"num_views": [3, 13, 7], "vision_tokens": [432, 1872, 1008], "text_tokens": [20, 31, 25]}
OUTPUT_TOKENS = [1, 4, 2]


def expected_latency(network, setting, vision_tokens, text_tokens, output_tokens, mean=0.0, std=1.0):
    """By hand: the prefill, and a decode step at each position from 0."""
    tier = {"low": 0, "medium": 1, "high": 2}[setting["tier"]]
    inputs = torch.tensor(
        [[vision_tokens, text_tokens, tier, setting["top_k"], setting["num_blocks"]]], dtype=torch.float32
    )
    inputs = (inputs - mean) / std
    with torch.no_grad():
        steps = [network(inputs, position) for position in range(output_tokens)]
    return steps[0][0] + math.fsum(decode for _, decode in steps)


def all_expected(network, **kwargs):
    rows = zip(SETTINGS, COUNTS["vision_tokens"], COUNTS["text_tokens"], OUTPUT_TOKENS, strict=True)
    return torch.tensor([expected_latency(network, *row, **kwargs) for row in rows])


def test_predicts_what_the_original_network_does(network, tmp_path):
    path = save(
        tmp_path / "best_latency_estimator.pt", network, epoch=7, val_loss=0.1, optimizer_state_dict={"state": {}}
    )
    estimator = read_latency_estimator(path)
    predicted = estimator.predict_latency_ms(SETTINGS, COUNTS, OUTPUT_TOKENS)
    torch.testing.assert_close(predicted, all_expected(network))


@pytest.mark.parametrize("sizes", [{"num_layers": 1}, {"num_layers": 3, "hidden": 8}, {"position": 1}])
def test_sizes_follow_from_the_weights(tmp_path, sizes):
    torch.manual_seed(1)
    network = OriginalNetwork(**sizes).eval()
    network.prefill_head[-1].bias.data.fill_(50.0)
    network.decode_head[-1].bias.data.fill_(50.0)
    estimator = read_latency_estimator(save(tmp_path / "best_latency_estimator.pt", network))
    predicted = estimator.predict_latency_ms(SETTINGS, COUNTS, OUTPUT_TOKENS)
    torch.testing.assert_close(predicted, all_expected(network))


def test_is_saved_and_loaded_like_every_model(network, tmp_path):
    estimator = read_latency_estimator(save(tmp_path / "a.pt", network))
    estimator.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    loaded = read_latency_estimator(tmp_path / "saved")
    assert isinstance(loaded, OriginalLatencyEstimatorModel)
    for model in (estimator, loaded):
        predicted = model.predict_latency_ms(SETTINGS, COUNTS, OUTPUT_TOKENS)
        torch.testing.assert_close(predicted, all_expected(network))


def test_its_latencies_are_of_the_model_alone(network, tmp_path):
    path = save(tmp_path / "a.pt", network)
    estimator = read_latency_estimator(path, "model")
    assert estimator.latency_scope == "model" and estimator.way is None
    with pytest.raises(ValueError, match="of the model alone, .* or pass `--latency_scope model`") as error:
        read_latency_estimator(path, "request")
    assert "\n" not in str(error.value)


def test_statistics_in_the_file_are_used(network, tmp_path):
    mean, std = torch.tensor([900.0, 25.0, 1.0, 6.0, 14.0]), torch.tensor([600.0, 9.0, 0.8, 2.0, 1.6])
    path = save(
        tmp_path / "a.pt",
        network,
        input_mean=mean,
        normalization={"input_std": std.tolist(), "prefill_mean": 0.0, "prefill_std": 1.0},
        config={"hidden_dim": 12, "dropout": 0.5, "lr": 1e-3},
    )
    predicted = read_latency_estimator(path).predict_latency_ms(SETTINGS, COUNTS, OUTPUT_TOKENS)
    torch.testing.assert_close(predicted, all_expected(network, mean=mean, std=std))
    assert not torch.allclose(predicted, all_expected(network))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"log_targets": True}, "holds `log_targets` True, which is not understood"),
        ({"input_mean": [1.0, 2.0]}, "'input_mean': it has 2 values for 5 inputs"),
        ({"config": {"hidden_dim": 64}}, "says `hidden_dim` 64, but its layers are \\[12\\] wide"),
        ({"config": {"output_activation": "softplus"}}, "holds `output_activation` 'softplus', which"),
        ({"config": {"activation": "gelu"}}, "`activation` 'gelu'"),
    ],
)
def test_what_is_not_understood_is_refused(network, tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        read_latency_estimator(save(tmp_path / "a.pt", network, **entries))


class NotATensor:
    pass


def test_files_that_are_something_else_are_refused(network, tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match="a.pt' does not exist"):
        read_latency_estimator(path)
    torch.save({"model_state_dict": network.state_dict(), "args": NotATensor()}, path)
    with pytest.raises(ValueError, match="cannot be read as tensors and plain values"):
        read_latency_estimator(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read as tensors and plain values"):
        read_latency_estimator(path)
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match="is not a dict with a `model_state_dict`"):
        read_latency_estimator(path)
    state = network.state_dict()
    torch.save({"model_state_dict": {**state, "tier_embedding.weight": torch.zeros(3, 4)}}, path)
    with pytest.raises(ValueError, match="weight 'tier_embedding.weight', which is not understood"):
        read_latency_estimator(path)
    torch.save({"model_state_dict": {k: v for k, v in state.items() if "decode_head" not in k}}, path)
    with pytest.raises(ValueError, match="lacks weights or biases of 'decode_head'"):
        read_latency_estimator(path)
    torch.save({"model_state_dict": {**state, "prefill_head.0.weight": torch.zeros(6, 11)}}, path)
    with pytest.raises(ValueError, match="'prefill_head': a layer takes 11 values, but is given 12"):
        read_latency_estimator(path)


def test_times_that_are_none_are_refused(network, tmp_path):
    network.decode_head[-1].bias.data.fill_(-20.0)
    estimator = read_latency_estimator(save(tmp_path / "a.pt", network))
    with pytest.raises(ValueError, match="ms for a request at tier=.*, which is not a time: its file may lack"):
        estimator.predict_latency_ms(SETTINGS, COUNTS, OUTPUT_TOKENS)
    with pytest.raises(ValueError, match="`output_tokens` holds 0"):
        estimator.predict_latency_ms(SETTINGS, COUNTS, [0, 1, 1])
    with pytest.raises(ValueError, match="have the shapes .*\\(2,\\)\\] but there are 3 settings"):
        estimator.predict_latency_ms(SETTINGS, COUNTS, [1, 1])


def test_requests_at_several_settings_have_a_row_each(network, tmp_path):
    estimator = read_latency_estimator(save(tmp_path / "a.pt", network))
    counts = {
        "num_views": torch.tensor([[3, 13, 7], [2, 5, 5]]),
        "vision_tokens": torch.tensor([[432, 1872, 1008], [288, 720, 720]]),
        "text_tokens": torch.tensor([[20], [31]]).expand(2, 3),
    }
    predicted = estimator.predict_latency_ms(SETTINGS, counts, torch.tensor(3))
    assert predicted.shape == (2, 3) and predicted.dtype == torch.float32
    for row in range(2):
        one = {name: values[row] for name, values in counts.items()}
        torch.testing.assert_close(predicted[row], estimator.predict_latency_ms(SETTINGS, one, [3, 3, 3]))


def test_known_outcomes_are_estimated_from_their_counts(network, tmp_path):
    estimator = read_latency_estimator(save(tmp_path / "a.pt", network))
    outcomes = [
        Outcome("a", setting, "red", 1.0, {name: values[row] for name, values in COUNTS.items()}, OUTPUT_TOKENS[row])
        for row, setting in enumerate(SETTINGS)
    ]
    torch.testing.assert_close(estimator.latency_ms(outcomes), all_expected(network))


def test_what_it_cannot_predict_is_refused(network, tmp_path):
    estimator = read_latency_estimator(save(tmp_path / "a.pt", network))
    with pytest.raises(ValueError, match="upper quantiles, which the original latency estimators do not predict"):
        estimator.predict_latency_ms(SETTINGS, COUNTS, OUTPUT_TOKENS, quantile=0.95)
    for setting in (KnobSetting(tier="low", depth=4), KnobSetting(tier="tiny", top_k=4, num_blocks=12)):
        with pytest.raises(ValueError, match=f"cannot read the setting '{setting}': it knows tier"):
            estimator.predict_latency_ms([setting] * 3, COUNTS, OUTPUT_TOKENS)


def test_an_executor_is_not_known_by_it(network, tmp_path, caplog):
    estimator = read_latency_estimator(save(tmp_path / "a.pt", network))
    joint_logger = logging.getLogger(OriginalLatencyEstimatorModel.__module__)
    joint_logger.addHandler(caplog.handler)
    try:
        estimator.check_executor(None)
    finally:
        joint_logger.removeHandler(caplog.handler)
    assert "does not say which executor it is of" in caplog.text

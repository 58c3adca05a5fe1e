"""Samples whose outcomes at all settings are made up: what each policy should choose can be found by plain loops."""

import numpy as np

from joint_controller.knobs import Knob, KnobSpace
from joint_controller.outcomes import Outcome, OutcomeStore, RecordedOutcomes


SPACE = KnobSpace([Knob("size", ("small", "large"), stage=1), Knob("depth", (1, 2, 3), stage=2)])
SETTINGS = SPACE.settings
TYPES = ("color", "count", "text")


def make_samples(num_samples, seed):
    """Samples of unequal sizes, with what they take and gain at each setting. Accuracies are few, so that there are ties."""
    generator = np.random.default_rng(seed)
    samples = []
    for number in range(num_samples):
        scale = generator.uniform(0.6, 1.6)
        typical_ms = scale * np.array([4.0, 6.0, 8.0, 10.0, 14.0, 18.0]) + generator.uniform(0, 0.5, 6)
        samples.append(
            {
                "sample_id": f"{('shapes', 'signs')[number % 2]}/{seed}/{number}",
                "image": f"image {seed} {number // 4}".encode(),
                "question": "what is it?",
                "question_type": TYPES[number % 3] if number % 7 else "rare",
                "upper_ms": 1.3 * typical_ms,
                # As outcomes keep it, and torch gives it back.
                "latency_ms": typical_ms.astype(np.float32).astype(np.float64),
                "accuracy": np.round(generator.random(6) * 2) / 2,
            }
        )
    return samples


def record(samples):
    """The outcomes of samples at all settings, as they would have been recorded."""
    store = OutcomeStore(None, "made up", SPACE)
    store.add(
        [
            Outcome(
                sample["sample_id"],
                setting,
                "?",
                float(sample["accuracy"][position]),
                {},
                2,
                float(sample["latency_ms"][position]),
            )
            for sample in samples
            for position, setting in enumerate(SETTINGS)
        ]
    )
    return RecordedOutcomes(store, SPACE)


class MadeUpForecast:
    """Latencies that samples bring along."""

    def __init__(self, is_upper=True):
        self.is_upper = is_upper

    def latency_ms(self, samples):
        return np.array([sample["upper_ms"] for sample in samples]).reshape(len(samples), len(SETTINGS))

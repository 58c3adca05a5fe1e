"""Summaries of a request table: means with bootstrap intervals, paired differences from a baseline, and tables of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
from datasets import Dataset, Features, Value

from .request_table import arrow_table, check_request_table


if TYPE_CHECKING:
    from rich.table import Table


SWEEP_FILE = "sweep.parquet"
"""Name of a summary in an output folder."""

SWEEP_JSON_FILE = "sweep.json"
SWEEP_MARKDOWN_FILE = "sweep.md"

SCHEMA_VERSION = 1
"""Version of the schema of `sweep.json`."""

STATIC = "static"
"""Policy that others are compared with: the best fixed setting of each budget by training accuracy."""

ALL = "all"
"""Value of the column `dataset` in rows about all data sets together."""

NUM_RESAMPLES = 2000
"""Resamples of a bootstrap interval."""

_INTERVAL = (0.025, 0.975)
_QUANTILES = (50, 95, 99)
_CHUNK_WEIGHTS = 4_000_000  # weights of resamples in memory at a time: 32 MB

_DTYPES = {
    "dataset": "string",
    "policy": "string",
    "budget_fraction": "float64",
    "latency_budget_ms": "float64",
    "num_samples": "int64",
    "num_images": "int64",
    "num_seeds": "int64",
    "accuracy": "float64",
    "accuracy_low": "float64",
    "accuracy_high": "float64",
    "latency_ms": "float64",
    "latency_p50_ms": "float64",
    "latency_p95_ms": "float64",
    "latency_p99_ms": "float64",
    "violations": "float64",
    "mean_overshoot_ms": "float64",
    "measured_ms": "float64",
    "measured_p50_ms": "float64",
    "measured_p95_ms": "float64",
    "measured_p99_ms": "float64",
    "measured_violations": "float64",
    "controller_ms": "float64",
    "reward": "float64",
    "most_common_setting": "string",
    "most_common_share": "float64",
    "accuracy_difference": "float64",
    "accuracy_difference_low": "float64",
    "accuracy_difference_high": "float64",
    "latency_saved": "float64",
    "latency_saved_low": "float64",
    "latency_saved_high": "float64",
    "static_latency_at_equal_accuracy_ms": "float64",
}

SUMMARY_FEATURES = Features({name: Value(dtype) for name, dtype in _DTYPES.items()})
"""Columns of a summary, which `docs/sweep.md` explains."""


def summarize(
    requests: Dataset, baseline: str | None = STATIC, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Dataset:
    """
    Summarises a request table.

    Intervals are 95 % percentile intervals of a bootstrap over images: in each resample as many images are drawn with
    replacement as there are, each with all its questions and all seeds. All policies and budgets see the same resamples, so
    differences from the baseline are paired.

    Args:
        requests (`datasets.Dataset`):
            A request table.
        baseline (`str`, *optional*, defaults to `"static"`):
            Policy that all are compared with under the same budget. `None` leaves the comparison out.
        num_resamples (`int`, *optional*, defaults to 2000):
            Resamples.
        seed (`int`, *optional*, defaults to 0):
            Seed of the resamples.

    Returns:
        `datasets.Dataset`: with the columns of `SUMMARY_FEATURES`, a row for each data set (all together come first, as
        `"all"`), budget and policy.

    Raises:
        ValueError: If the table is not a request table or empty, the baseline is not in it, policies were not asked for the
            same samples, or there are no resamples.
    """
    check_request_table(requests)
    if len(requests) == 0:
        raise ValueError("the request table has no rows: there is nothing to summarise.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` is {num_resamples}: give 1 or more.")
    columns = _Columns(arrow_table(requests))
    if baseline is not None and baseline not in columns.policies:
        raise ValueError(
            f"`baseline` is '{baseline}', which is not among the policies of the table ({', '.join(columns.policies)}): name one "
            "of these, or None."
        )
    columns.check_samples()
    scopes = [(ALL, slice(None))]
    scopes += [(name, columns.dataset == code) for code, name in enumerate(columns.datasets)]
    rows = [
        row
        for name, chosen in scopes
        for row in _summarize_scope(name, columns, chosen, baseline, num_resamples, seed)
    ]
    return Dataset.from_list(rows, features=SUMMARY_FEATURES)


class _Columns:
    """The columns of a request table as numbers, and what their codes stand for."""

    def __init__(self, table: pyarrow.Table):
        self.policy, self.policies = _encode(table["policy"])
        self.sample, self.samples = _encode(table["sample_id"])
        self.image, _ = _encode(table["image_id"])
        self.dataset, self.datasets = _encode(table["dataset"])
        self.setting, self.settings = _encode(table["setting"])
        self.seed, self.seeds = _encode(table["seed"])
        self.budget, budgets_ms = _encode(table["latency_budget_ms"])
        self.budgets_ms = sorted(budgets_ms)
        self.budget = np.searchsorted(self.budgets_ms, budgets_ms)[self.budget]
        self.accuracy, self.latency_ms, self.reward, fraction = (
            table[name].to_numpy() for name in ("accuracy", "latency_ms", "reward", "budget_fraction")
        )
        # Null becomes NaN.
        self.measured_ms, self.controller_ms = (table[name].to_numpy() for name in ("measured_ms", "controller_ms"))
        first_rows = np.unique(self.budget, return_index=True)[1]
        self.budget_fractions = fraction[first_rows].tolist()

    def check_samples(self) -> None:
        """Refuses policies that were not asked for the same samples: they could not be compared."""
        num_samples = len(self.samples)
        run = (self.policy * len(self.seeds) + self.seed) * len(self.budgets_ms) + self.budget
        keys = np.sort(run * num_samples + self.sample)
        repeated = keys[1:][keys[1:] == keys[:-1]]
        if len(repeated):
            code, sample = divmod(int(repeated[0]), num_samples)
            raise ValueError(f"sample '{self.samples[sample]}' occurs twice {self._name(code)}: leave one row out.")
        for code, count in zip(*(values.tolist() for values in np.unique(run, return_counts=True)), strict=True):
            if count < num_samples:
                raise ValueError(
                    f"there are {count} of {num_samples} samples {self._name(code)}: compare policies on the same samples."
                )

    def _name(self, run: int) -> str:
        policy_and_seed, budget = divmod(run, len(self.budgets_ms))
        policy, seed = divmod(policy_and_seed, len(self.seeds))
        return f"for policy '{self.policies[policy]}' (seed {self.seeds[seed]}) at {self.budgets_ms[budget]:.3f} ms"


def _encode(column: pyarrow.ChunkedArray) -> tuple[np.ndarray, list[Any]]:
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pyarrow.ChunkedArray):
        encoded = encoded.combine_chunks()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _summarize_scope(
    name: str, columns: _Columns, chosen: slice | np.ndarray, baseline: str | None, num_resamples: int, seed: int
) -> list[dict[str, Any]]:
    num_policies = len(columns.policies)
    group = (columns.budget * num_policies + columns.policy)[chosen]
    image = np.unique(columns.image[chosen], return_inverse=True)[1]
    num_images, num_groups = int(image.max()) + 1, int(group.max()) + 1
    accuracy, latency_ms = columns.accuracy[chosen], columns.latency_ms[chosen]
    # Of each group and image: requests, and sums of accuracy and of latency.
    cell = group * num_images + image
    sums = np.concatenate(
        [
            np.bincount(cell, weights, num_groups * num_images).reshape(num_groups, num_images)
            for weights in (np.ones(len(cell)), accuracy, latency_ms)
        ]
    )
    counts, accuracies, latencies = np.split(sums.sum(axis=1), 3)
    resampled = np.split(_resample(sums, num_resamples, seed), 3, axis=1)  # (resamples, groups) each
    with np.errstate(invalid="ignore"):  # a policy need not have every budget
        mean_accuracy, mean_latency = accuracies / counts, latencies / counts
        resampled_accuracy, resampled_latency = resampled[1] / resampled[0], resampled[2] / resampled[0]

    curve = None
    if STATIC in columns.policies:
        of_static = [number for number in range(columns.policies.index(STATIC), num_groups, num_policies)]
        of_static = [number for number in of_static if counts[number]]
        curve = mean_latency[of_static], mean_accuracy[of_static]
    fields = {
        field: getattr(columns, field)[chosen]
        for field in ("sample", "seed", "setting", "reward", "measured_ms", "controller_ms")
    }
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(np.bincount(group, minlength=num_groups))
    rows = []
    for number in np.flatnonzero(counts):
        members = order[ends[number] - int(counts[number]) : ends[number]]
        budget, policy = divmod(int(number), num_policies)
        budget_ms = columns.budgets_ms[budget]
        of_group = {field: values[members] for field, values in fields.items()}
        taken_ms = latency_ms[members]
        times_setting = np.bincount(of_group["setting"], minlength=len(columns.settings))
        most = times_setting.max()
        row: dict[str, Any] = dict.fromkeys(_DTYPES)
        row |= {
            "dataset": name,
            "policy": columns.policies[policy],
            "budget_fraction": columns.budget_fractions[budget],
            "latency_budget_ms": budget_ms,
            "num_samples": len(np.unique(of_group["sample"])),
            "num_images": num_images,
            "num_seeds": len(np.unique(of_group["seed"])),
            "accuracy": mean_accuracy[number],
            **_interval("accuracy", resampled_accuracy[:, number]),
            "latency_ms": mean_latency[number],
            **_percentiles("latency", taken_ms),
            "violations": (taken_ms > budget_ms).mean(),
            "mean_overshoot_ms": _mean(taken_ms[taken_ms > budget_ms] - budget_ms) or 0.0,
            "controller_ms": _mean(of_group["controller_ms"]),
            "reward": of_group["reward"].mean(),
            "most_common_setting": min(columns.settings[code] for code in np.flatnonzero(times_setting == most)),
            "most_common_share": most / len(members),
        }
        measured_ms = of_group["measured_ms"][~np.isnan(of_group["measured_ms"])]
        if len(measured_ms):
            row |= {
                "measured_ms": measured_ms.mean(),
                **_percentiles("measured", measured_ms),
                "measured_violations": (measured_ms > budget_ms).mean(),
            }
        other = None if baseline is None else budget * num_policies + columns.policies.index(baseline)
        if other is not None and other < num_groups and counts[other]:
            difference = resampled_accuracy[:, number] - resampled_accuracy[:, other]
            saved = 1 - resampled_latency[:, number] / resampled_latency[:, other]
            row |= {
                "accuracy_difference": mean_accuracy[number] - mean_accuracy[other],
                **_interval("accuracy_difference", difference),
                "latency_saved": 1 - mean_latency[number] / mean_latency[other],
                **_interval("latency_saved", saved),
            }
        if curve is not None:
            row["static_latency_at_equal_accuracy_ms"] = latency_at_accuracy(*curve, mean_accuracy[number])
        rows.append({field: value.item() if isinstance(value, np.generic) else value for field, value in row.items()})
    return rows


def _resample(sums: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """
    Sums over resampled images.

    Args:
        sums (`np.ndarray` of shape `(k, images)`):
            Sums of each image.

    Returns:
        `np.ndarray` of shape `(num_resamples, k)`
    """
    num_images = sums.shape[1]
    generator = np.random.default_rng(seed)
    per_chunk = max(1, _CHUNK_WEIGHTS // num_images)
    resampled = np.empty((num_resamples, len(sums)))
    for start in range(0, num_resamples, per_chunk):
        size = min(per_chunk, num_resamples - start)
        # How often each image is drawn: multinomial, as counts of draws.
        draws = generator.integers(num_images, size=(size, num_images))
        draws += num_images * np.arange(size)[:, None]
        weights = np.bincount(draws.ravel(), minlength=size * num_images).reshape(size, num_images)
        resampled[start : start + size] = weights.astype(np.float64) @ sums.T
    return resampled


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[Any], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """
    95 % percentile interval of a mean, from a bootstrap over groups.

    Args:
        values (`Sequence[float]`):
            n values.
        groups (`Sequence`):
            Group of each, e.g. its image: values of a group are drawn together.
        num_resamples (`int`, *optional*, defaults to 2000):
            Resamples.
        seed (`int`, *optional*, defaults to 0):
            Seed of the resamples.

    Returns:
        `tuple[float, float]`: its ends.

    Raises:
        ValueError: If there are no values, or not as many groups.
    """
    if len(values) == 0 or len(values) != len(groups):
        raise ValueError(
            f"there are {len(values)} values and {len(groups)} groups: give one or more, with a group each."
        )
    codes: dict[Any, int] = {}
    group = np.array([codes.setdefault(one, len(codes)) for one in groups])
    sums = np.stack([np.bincount(group), np.bincount(group, np.asarray(values, dtype=np.float64))])
    counts, totals = _resample(sums, num_resamples, seed).T
    low, high = np.quantile(totals / counts, _INTERVAL)
    return float(low), float(high)


def _interval(name: str, resampled: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(resampled, _INTERVAL)
    return {f"{name}_low": low, f"{name}_high": high}


def _percentiles(name: str, values: np.ndarray) -> dict[str, float]:
    return dict(zip((f"{name}_p{share}_ms" for share in _QUANTILES), np.percentile(values, _QUANTILES), strict=True))


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return known.mean() if len(known) else None


def latency_at_accuracy(latency_ms: Sequence[float], accuracy: Sequence[float], wanted: float) -> float | None:
    """
    What a curve of accuracy against latency takes to reach an accuracy: the curve goes straight from each of its points that
    is better than all faster ones to the next.

    Args:
        latency_ms, accuracy (`Sequence[float]`):
            Points of the curve, in any order.
        wanted (`float`):
            The accuracy.

    Returns:
        `float` or `None`: the lowest latency in ms; that of the fastest point where it suffices, `None` where none does.
    """
    frontier: list[tuple[float, float]] = []
    for point_ms, reached in sorted(zip(latency_ms, accuracy, strict=True), key=lambda point: (point[0], -point[1])):
        if not frontier or reached > frontier[-1][1]:
            frontier.append((float(point_ms), float(reached)))
    if not frontier or wanted > frontier[-1][1]:
        return None
    # Latency as a function of accuracy, which rises along the frontier; below its range that of the fastest point.
    return float(np.interp(wanted, [reached for _, reached in frontier], [point_ms for point_ms, _ in frontier]))


def write_summary(summary: Dataset, folder: str | Path, baseline: str | None = STATIC) -> list[Path]:
    """
    Writes a summary as `sweep.parquet` and `sweep.json`, whose schema `docs/sweep.md` gives.

    Args:
        summary (`datasets.Dataset`):
            What [`summarize`] gives.
        folder (`str` or `Path`):
            The folder.
        baseline (`str`, *optional*, defaults to `"static"`):
            What it compares with.

    Returns:
        `list[Path]`: the files.
    """
    table_file, json_file = Path(folder) / SWEEP_FILE, Path(folder) / SWEEP_JSON_FILE
    summary.to_parquet(table_file)
    rows = summary.to_list()
    budgets = {
        row["latency_budget_ms"]: {name: row[name] for name in ("budget_fraction", "latency_budget_ms")}
        for row in rows
    }
    content = {
        "schema_version": SCHEMA_VERSION,
        "baseline": baseline,
        "budgets": list(budgets.values()),
        "rows": rows,
    }
    json_file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return [table_file, json_file]


def rows_of(summary: Dataset, dataset: str = ALL, policies: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a summary about a data set (by default all together) and some policies (by default all)."""
    return [
        row
        for row in summary.to_list()
        if row["dataset"] == dataset and (policies is None or row["policy"] in policies)
    ]


def mean_over_budgets(summary: Dataset, column: str, policy: str) -> float:
    """Mean of a column over the budgets of a policy, all data sets together."""
    return float(np.mean([row[column] for row in rows_of(summary, policies=[policy])]))


def format_summary_table(
    summary: Dataset, title: str, policies: Sequence[str] | None = None, dataset: str = ALL
) -> "Table":
    """
    A summary for the console: accuracy with half the width of its interval, mean latency, the share of the baseline's latency
    that is saved, and violations.

    Args:
        summary (`datasets.Dataset`):
            What [`summarize`] gives.
        title (`str`):
            Title of the table.
        policies (`Sequence[str]`, *optional*):
            Policies to show. By default all.
        dataset (`str`, *optional*, defaults to `"all"`):
            Data set to show.

    Returns:
        `rich.table.Table`
    """
    from rich.box import SIMPLE
    from rich.table import Table

    # Narrow enough for a terminal of 80 columns.
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("budget", "policy", "accuracy", "latency", "saved", "violations"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    previous = None
    for row in rows_of(summary, dataset, policies):
        is_new = row["latency_budget_ms"] != previous
        if is_new and previous is not None:
            table.add_section()
        previous = row["latency_budget_ms"]
        half_width = (row["accuracy_high"] - row["accuracy_low"]) / 2
        table.add_row(
            f"{row['budget_fraction']:.2f} = {previous:.1f} ms" if is_new else "",
            row["policy"],
            f"{row['accuracy']:.3f} ± {half_width:.3f}",
            f"{row['latency_ms']:.1f} ms",
            "-" if row["latency_saved"] is None else f"{round(100 * row['latency_saved']) + 0:d}%",
            f"{row['violations']:.1%}",
        )
    return table


def _percent(value: float | None) -> str:
    # Rounded first, so that nothing is shown as -0.0 %.
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}%"


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"


def format_summary_markdown(summary: Dataset, policies: Sequence[str] | None = None, dataset: str = ALL) -> str:
    """
    A summary as a Markdown table, with the intervals. Arguments are those of [`format_summary_table`].

    Returns:
        `str`: a line for each budget and policy.
    """
    lines = [
        "| budget (ms) | of full | policy | accuracy | difference (points) | latency (ms) | p95 (ms) | latency saved | "
        "violations | most common setting |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows_of(summary, dataset, policies):
        difference = saved = "-"
        if row["accuracy_difference"] is not None:
            ends = (row[f"accuracy_difference_{end}"] for end in ("low", "high"))
            difference = f"{_points(row['accuracy_difference'])} [{', '.join(map(_points, ends))}]"
            ends = (row[f"latency_saved_{end}"] for end in ("low", "high"))
            saved = f"{_percent(row['latency_saved'])} [{', '.join(map(_percent, ends))}]"
        lines.append(
            f"| {row['latency_budget_ms']:.1f} | {row['budget_fraction']:.2f} | {row['policy']} | {row['accuracy']:.3f} "
            f"[{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}] | {difference} | {row['latency_ms']:.1f} | "
            f"{row['latency_p95_ms']:.1f} | {saved} | {row['violations']:.1%} | {row['most_common_setting']} "
            f"({row['most_common_share']:.0%}) |"
        )
    return "\n".join(lines)


def format_headline_markdown(summary: Dataset, policy: str = "controller") -> str:
    """
    The two questions that a policy is judged by, as a Markdown table with a line for each budget: how accurate it is within
    the budget, and what the best static setting takes to be as accurate; both compared with `"static"`.

    Args:
        summary (`datasets.Dataset`):
            What [`summarize`] gives, with `"static"` as the baseline.
        policy (`str`, *optional*, defaults to `"controller"`):
            The policy.

    Returns:
        `str`: the table.

    Raises:
        ValueError: If the summary has no rows of the policy or of `"static"`.
    """
    ours, static = (
        {row["latency_budget_ms"]: row for row in rows_of(summary, policies=[one])} for one in (policy, STATIC)
    )
    for name, rows in ((policy, ours), (STATIC, static)):
        if not rows:
            raise ValueError(f"the summary has no policy '{name}': compare a policy that is there with '{STATIC}'.")
    lines = [
        f"| budget (ms) | of full | accuracy: {policy} | {STATIC} | difference (points) | latency (ms): {policy} | {STATIC}, "
        "equally accurate | saved |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for budget_ms, row in ours.items():
        if budget_ms not in static:
            continue
        difference = row["accuracy"] - static[budget_ms]["accuracy"]
        equal_ms, saved = row["static_latency_at_equal_accuracy_ms"], None
        if equal_ms is not None:
            saved = 1 - row["latency_ms"] / equal_ms
        lines.append(
            f"| {budget_ms:.1f} | {row['budget_fraction']:.2f} | {row['accuracy']:.3f} | {static[budget_ms]['accuracy']:.3f} | "
            f"{_points(difference)} | {row['latency_ms']:.1f} | {'never' if equal_ms is None else f'{equal_ms:.1f}'} | "
            f"{_percent(saved)} |"
        )
    return "\n".join(lines)

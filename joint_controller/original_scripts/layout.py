"""
Reads the results that the original profiling scripts write: a folder of folders, one a data set, of JSON files, one a
knob setting:

```
<results_dir>/<dataset>/<dataset>_imgsizetier-<tier>_crops<n>_topk<k>_blocks<b>.json
```

Each holds `per_sample_results`, a list with one entry a sample, and usually a `summary`.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.registry import VQA_DATASETS
from ..data.schema import DEFAULT_METRIC, DEFAULT_QUESTION_TYPE, DEFAULT_STYLE
from ..evaluation.scoring import score_answer
from ..knobs import KnobSpace
from ..molmo.knob_space import TIERS, build_knob_space


_FILE_NAME = re.compile(
    r"(?P<dataset>.+)_imgsizetier-(?P<tier>[^_]+)_crops\d+_topk(?P<top_k>\d+)_blocks(?P<num_blocks>\d+)\.json"
)
_FILE_NAME_PATTERN = "<dataset>_imgsizetier-<tier>_crops<n>_topk<k>_blocks<b>.json"

# Fields of an entry by the column that takes them.
_COUNTS = {
    "num_views": "actual_num_crops",
    "vision_tokens": "actual_vision_tokens",
    "text_tokens": "actual_text_tokens",
    "output_tokens": "output_tokens",
}
_TIMES = {
    "vision_ms": "T_vision_total",
    "llm_prefill_ms": "T_LLM_prefill",
    "decode_ms": "T_LLM_decode",
    "decode_ms_per_token": "T_decode_per_token",
    "latency_ms": "T_total",
}

_ROUNDING = 0.01
"""Share by which a total may fall below the sum of its stages: times are written with few digits."""


def find_dataset_folders(results_dir: str | Path) -> dict[str, Path]:
    """Folders of a results folder by the name of their data set, in which dashes have become underscores."""
    results_dir = Path(results_dir)
    if not results_dir.is_dir():
        raise FileNotFoundError(f"results folder '{results_dir}' does not exist: check the path.")
    folders: dict[str, Path] = {}
    for folder in sorted(path for path in results_dir.iterdir() if path.is_dir()):
        name = dataset_name_of(folder.name)
        if name in folders:
            raise ValueError(f"'{folders[name]}' and '{folder}' both hold results of '{name}': keep one of them.")
        folders[name] = folder
    if not folders:
        raise ValueError(
            f"results folder '{results_dir}' has no folder in it: give the folder that holds "
            f"<dataset>/{_FILE_NAME_PATTERN}."
        )
    return folders


def dataset_name_of(folder_name: str) -> str:
    """Name of a data set from that of its folder: `"coco-2014-vqa"` holds `"coco_2014_vqa"`."""
    return folder_name.replace("-", "_")


def metric_of(dataset_name: str) -> str:
    """Metric that answers of a data set are scored by."""
    return VQA_DATASETS[dataset_name].metric if dataset_name in VQA_DATASETS else DEFAULT_METRIC


def read_original_results(folders: Mapping[str, Path]) -> tuple[list[dict[str, Any]], KnobSpace, str]:
    """
    Reads the results of data sets, given by the folder of each, and refuses what is broken or contradicts itself: a
    `ValueError` that names file, sample and field.

    Returns:
        `tuple[list[dict[str, Any]], KnobSpace, str]`: The measurements, data set by data set; all knob values that occur; and
        a SHA-256 of the files. A measurement has the columns of a sample (its `image` is null, its `image_id` may be), the
        knobs, `answer`, `accuracy` (computed again, by the metric of the data set) and `recorded_accuracy`, the counts and
        `output_tokens`, times in ms (`vision_ms` with the connector, `llm_prefill_ms`, `decode_ms`, `decode_ms_per_token`,
        `latency_ms`), and `file`, where it was found.
    """
    digest = hashlib.sha256()
    rows: dict[tuple, dict[str, Any]] = {}
    first_of_sample: dict[str, dict[str, Any]] = {}
    first_of_tier: dict[str, dict[str, Any]] = {}
    for dataset_name, folder in folders.items():
        files = sorted(folder.glob("*.json"))
        if not files:
            raise ValueError(f"'{folder}' has no results in it: there is no {_FILE_NAME_PATTERN}.")
        for file in files:
            content = file.read_bytes()
            digest.update(f"{dataset_name}/{file.name} {len(content)}\n".encode() + content)
            for where, row in _read_file(file, dataset_name, content):
                tier, top_k, num_blocks = setting = row["tier"], row["top_k"], row["num_blocks"]
                known = rows.setdefault((row["sample_id"], *setting), row)
                if known is not row:
                    raise ValueError(
                        f"{where}: it is in '{known['file']}' at tier={tier} top_k={top_k} num_blocks={num_blocks} "
                        "already: keep one."
                    )
                first = first_of_sample.setdefault(row["sample_id"], row)
                for field in ("question", "answers", "image_id"):
                    if row[field] != first[field]:
                        raise ValueError(
                            f"{where}, field '{field}': it is {row[field]!r}, but {first[field]!r} in '{first['file']}': "
                            "both must be of one run over one data set."
                        )
                first = first_of_tier.setdefault(tier, row)
                if row["tier_crops"] != first["tier_crops"]:
                    raise ValueError(
                        f"tier '{tier}' has {first['tier_crops']} crops in '{first['file']}', but {row['tier_crops']} in "
                        f"'{row['file']}': import these data sets one by one."
                    )
    space = build_knob_space(
        {tier: first_of_tier[tier]["tier_crops"] for tier in TIERS if tier in first_of_tier},
        *(sorted({row[name] for row in rows.values()}) for name in ("top_k", "num_blocks")),
    )
    return list(rows.values()), space, digest.hexdigest()


def _read_file(file: Path, dataset_name: str, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """The measurements of a file, each with the words that say where it was found."""
    match = _FILE_NAME.fullmatch(file.name)
    if match is None:
        raise ValueError(f"'{file}' is not named {_FILE_NAME_PATTERN}: rename it, or move it elsewhere.")
    if dataset_name_of(match["dataset"]) != dataset_name:
        raise ValueError(
            f"'{file}' is named after data set '{match['dataset']}' but lies in the folder of '{dataset_name}': move it."
        )
    if match["tier"] not in TIERS:
        raise ValueError(f"'{file}' is of tier '{match['tier']}': tiers are {', '.join(TIERS)}.")
    named = {"tier": match["tier"], "top_k": int(match["top_k"]), "num_active_blocks": int(match["num_blocks"])}
    try:
        results = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{file}' is not valid JSON ({error}): it may be cut off; record it again.") from error
    entries = results.get("per_sample_results") if isinstance(results, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"'{file}' has no list 'per_sample_results' with at least one entry: record it again.")
    summaries = results.get("summary", [])
    for summary in summaries if isinstance(summaries, list) else [summaries]:
        where = f"'{file}', field 'summary'"
        _check_named({name: _field(summary, name, where, default=named[name]) for name in named}, named, where)
        num_samples = _field(summary, "num_samples", where, default=len(entries))
        if num_samples != len(entries):
            raise ValueError(
                f"'{file}' holds {len(entries)} samples, but its summary speaks of {num_samples}: record it again."
            )
    for number, entry in enumerate(entries):
        sample_number = _field(entry, "sample_id", f"'{file}', entry {number}")
        if isinstance(sample_number, bool) or not isinstance(sample_number, int | str):
            raise ValueError(
                f"'{file}', entry {number}, field 'sample_id': {sample_number!r} is neither a number nor a string."
            )
        where = f"'{file}', sample {sample_number}"
        _check_named({name: _field(entry, name, where) for name in named}, named, where)
        knobs = {"tier": named["tier"], "top_k": named["top_k"], "num_blocks": named["num_active_blocks"]}
        yield where, {**_read_entry(entry, dataset_name, where), **knobs, "file": f"{file.parent.name}/{file.name}"}


def _read_entry(entry: Mapping[str, Any], dataset_name: str, where: str) -> dict[str, Any]:
    metadata, tier_range = (_field(entry, name, where, dict) for name in ("metadata", "tier_range"))
    answers = _field(metadata, "answers", f"{where}, metadata", list)
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(f"{where}, field 'metadata.answers': {answers!r} is not a list of one or more answers.")
    question = _field(metadata, "question", f"{where}, metadata", str)
    if not question.strip():
        raise ValueError(f"{where}, field 'metadata.question': the question is empty.")
    image_id = metadata.get("image_id")
    counts = {column: _count(entry, field, where) for column, field in _COUNTS.items()}
    counts["num_views"] += 1  # the global view, which is not among the crops
    times = {column: _number(entry, field, where) for column, field in _TIMES.items()}
    for column, time_ms in times.items():
        if time_ms <= 0:
            raise ValueError(f"{where}, field '{_TIMES[column]}': {time_ms:g} ms is not a time: it must be above 0.")
    stages_ms = times["vision_ms"] + times["llm_prefill_ms"] + times["decode_ms"]
    if times["latency_ms"] < (1 - _ROUNDING) * stages_ms:
        raise ValueError(
            f"{where}, field 'T_total': {times['latency_ms']} ms is less than its stages together take "
            f"({stages_ms:.3f} ms)."
        )
    recorded_accuracy = _number(entry, "accuracy", where)
    if recorded_accuracy < 0:
        raise ValueError(f"{where}, field 'accuracy': {recorded_accuracy:g} is below 0.")
    answer, metric = _field(entry, "pred", where, str), metric_of(dataset_name)
    return {
        "sample_id": f"{dataset_name}/recorded/{entry['sample_id']}",
        "image": None,
        "question": question,
        "answers": answers,
        "style": VQA_DATASETS[dataset_name].style if dataset_name in VQA_DATASETS else DEFAULT_STYLE,
        "metric": metric,
        "question_type": DEFAULT_QUESTION_TYPE,
        "image_id": None if image_id is None else str(image_id),
        "tier_crops": [_count(tier_range, name, f"{where}, tier_range") for name in ("min_crops", "max_crops")],
        "answer": answer,
        "accuracy": score_answer(metric, answer, answers),
        "recorded_accuracy": recorded_accuracy,
        **counts,
        **times,
    }


def _check_named(found: Mapping[str, Any], named: Mapping[str, Any], where: str):
    for name, value in named.items():
        if found[name] != value:
            raise ValueError(
                f"{where}, field '{name}': it is {found[name]!r}, but {value!r} by the name of the file: one of them is "
                "wrong."
            )


def _field(fields: Any, name: str, where: str, kind: type = object, default: Any = None) -> Any:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: it is not an object of fields: record it again.")
    value = fields.get(name, default)
    if name not in fields and default is None:
        raise ValueError(f"{where} has no field '{name}': record it again, or take the file out.")
    if not isinstance(value, kind):
        raise ValueError(f"{where}, field '{name}': {value!r} is not a {kind.__name__}.")
    return value


def _number(fields: Mapping[str, Any], name: str, where: str) -> float:
    value = _field(fields, name, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}, field '{name}': {value!r} is not a number.")
    return float(value)


def _count(fields: Mapping[str, Any], name: str, where: str) -> int:
    value = _number(fields, name, where)
    if not value.is_integer() or value < 1:
        raise ValueError(f"{where}, field '{name}': {value:g} is not a whole number of 1 or more.")
    return int(value)

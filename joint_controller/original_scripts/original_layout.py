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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..knobs import TIERS, KnobSetting


_FILE_NAME = re.compile(
    r"(?P<dataset>.+)_imgsizetier-(?P<tier>[^_]+)_crops\d+_topk(?P<top_k>\d+)_blocks(?P<num_blocks>\d+)\.json"
)
_FILE_NAME_PATTERN = "<dataset>_imgsizetier-<tier>_crops<n>_topk<k>_blocks<b>.json"

_ROUNDING = 0.01
"""Share by which a total may fall below the sum of its stages: times are written with few digits."""


@dataclass(frozen=True)
class RecordedMeasurement:
    """
    What the original scripts recorded of one sample at one knob setting.

    Args:
        dataset_name (`str`):
            Data set, with underscores: `"text_vqa"`.
        sample_number (`str`):
            The sample's number in its data set, as recorded.
        image_id (`str`, *optional*):
            What the data set calls the image.
        question (`str`):
            The question.
        answers (`tuple[str, ...]`):
            Reference answers.
        setting ([`KnobSetting`]):
            Knob setting.
        tier_crops (`tuple[int, int]`):
            Fewest and most crops of the tier.
        answer (`str`):
            The executor's answer.
        accuracy (`float`):
            Score of the answer as the original scripts computed it.
        num_crops (`int`):
            Crops of the image, without the global view.
        vision_tokens (`int`):
            Tokens that stood for the image.
        text_tokens (`int`):
            Tokens of the prompt beside the image's.
        output_tokens (`int`):
            Tokens generated, the end-of-sequence token included.
        vision_ms (`float`):
            Vision tower and connector, in ms.
        llm_prefill_ms (`float`):
            Language model over the prompt, in ms.
        decode_ms_per_token (`float`):
            Decoding, in ms an output token.
        total_ms (`float`):
            The whole request, in ms.
        file (`str`):
            File that it stands in, relative to the results folder.
    """

    dataset_name: str
    sample_number: str
    image_id: str | None
    question: str
    answers: tuple[str, ...]
    setting: KnobSetting
    tier_crops: tuple[int, int]
    answer: str
    accuracy: float
    num_crops: int
    vision_tokens: int
    text_tokens: int
    output_tokens: int
    vision_ms: float
    llm_prefill_ms: float
    decode_ms_per_token: float
    total_ms: float
    file: str


def find_dataset_folders(results_dir: str | Path) -> dict[str, Path]:
    """
    Folders of a results folder by the name of their data set, in which dashes have become underscores.

    Raises:
        FileNotFoundError: If the results folder does not exist.
        ValueError: If there is no data set in it, or two folders stand for one data set.
    """
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


def read_original_results(folders: Mapping[str, Path]) -> tuple[list[RecordedMeasurement], str]:
    """
    Reads results, and refuses what is broken or contradicts itself.

    Args:
        folders (`Mapping[str, Path]`):
            Folder of each data set, see [`find_dataset_folders`].

    Returns:
        `tuple[list[RecordedMeasurement], str]`: The measurements, data set by data set, and a SHA-256 of the files.

    Raises:
        ValueError: If a folder has no results, a file is not named as it should be, is no JSON or lacks a field, a field
            has a value that cannot be, file name and content contradict each other, a sample is recorded twice at a
            setting, or its question, answers or image differ between files. The message names file, sample and field.
    """
    digest = hashlib.sha256()
    measurements: list[RecordedMeasurement] = []
    for dataset_name, folder in folders.items():
        files = sorted(folder.glob("*.json"))
        if not files:
            raise ValueError(f"'{folder}' has no results in it: there is no {_FILE_NAME_PATTERN}.")
        of_dataset: dict[tuple[str, KnobSetting], RecordedMeasurement] = {}
        first_of_sample: dict[str, RecordedMeasurement] = {}
        for file in files:
            content = file.read_bytes()
            digest.update(f"{dataset_name}/{file.name} {len(content)}\n".encode() + content)
            for measurement in _read_file(file, dataset_name, content):
                key = (measurement.sample_number, measurement.setting)
                where = f"'{file}', sample {measurement.sample_number}"
                if key in of_dataset:
                    raise ValueError(
                        f"{where}: it stands in '{of_dataset[key].file}' at {measurement.setting} already: keep one."
                    )
                of_dataset[key] = measurement
                first = first_of_sample.setdefault(measurement.sample_number, measurement)
                for field in ("question", "answers", "image_id"):
                    if getattr(measurement, field) != getattr(first, field):
                        raise ValueError(
                            f"{where}, field '{field}': it is {getattr(measurement, field)!r}, but "
                            f"{getattr(first, field)!r} in '{first.file}': both must be of one run over one data set."
                        )
        measurements.extend(of_dataset.values())
    return measurements, digest.hexdigest()


def _read_file(file: Path, dataset_name: str, content: bytes) -> list[RecordedMeasurement]:
    match = _FILE_NAME.fullmatch(file.name)
    if match is None:
        raise ValueError(f"'{file}' is not named {_FILE_NAME_PATTERN}: rename it, or move it elsewhere.")
    if dataset_name_of(match["dataset"]) != dataset_name:
        raise ValueError(
            f"'{file}' is named after data set '{match['dataset']}' but lies in the folder of '{dataset_name}': move it."
        )
    named = {
        "tier": match["tier"],
        "top_k": int(match["top_k"]),
        "num_active_blocks": int(match["num_blocks"]),
    }
    if named["tier"] not in TIERS:
        raise ValueError(f"'{file}' is of tier '{named['tier']}': tiers are {', '.join(TIERS)}.")
    try:
        results = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{file}' is not valid JSON ({error}): it may be cut off; record it again.") from error
    entries = results.get("per_sample_results") if isinstance(results, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"'{file}' has no list 'per_sample_results' with at least one entry: record it again.")
    summaries = results.get("summary", [])
    for summary in summaries if isinstance(summaries, list) else [summaries]:
        _check_named(named, summary, f"'{file}', field 'summary'")
        if summary.get("num_samples", len(entries)) != len(entries):
            raise ValueError(
                f"'{file}' holds {len(entries)} samples, but its summary speaks of {summary['num_samples']}: record it "
                "again."
            )
    return [_read_entry(entry, number, file, dataset_name, named) for number, entry in enumerate(entries)]


def _read_entry(
    entry: Any, number: int, file: Path, dataset_name: str, named: Mapping[str, Any]
) -> RecordedMeasurement:
    where = f"'{file}', entry {number}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: it is not an object of fields: record it again.")
    sample_number = _field(entry, "sample_id", where)
    if isinstance(sample_number, bool) or not isinstance(sample_number, int | str):
        raise ValueError(f"{where}, field 'sample_id': {sample_number!r} is neither a number nor a string.")
    where = f"'{file}', sample {sample_number}"
    for name in named:
        _field(entry, name, where)
    _check_named(named, entry, where)

    metadata = _field(entry, "metadata", where, dict)
    answers = _field(metadata, "answers", f"{where}, metadata", list)
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(f"{where}, field 'metadata.answers': {answers!r} is not a list of one or more answers.")
    question = _field(metadata, "question", f"{where}, metadata", str)
    if not question.strip():
        raise ValueError(f"{where}, field 'metadata.question': the question is empty.")
    image_id = metadata.get("image_id")

    tier_range = _field(entry, "tier_range", where, dict)
    tier_crops = tuple(_count(tier_range, name, f"{where}, tier_range", 1) for name in ("min_crops", "max_crops"))
    accuracy = _number(entry, "accuracy", where)
    if accuracy < 0:
        raise ValueError(f"{where}, field 'accuracy': {accuracy:g} is below 0.")
    times = {
        name: _time(entry, name, where)
        for name in ("T_vision_total", "T_LLM_prefill", "T_LLM_decode", "T_total", "T_decode_per_token")
    }
    stages = times["T_vision_total"] + times["T_LLM_prefill"] + times["T_LLM_decode"]
    if times["T_total"] < (1 - _ROUNDING) * stages:
        raise ValueError(
            f"{where}, field 'T_total': {times['T_total']} ms is less than its stages together take ({stages:.3f} ms)."
        )
    return RecordedMeasurement(
        dataset_name=dataset_name,
        sample_number=str(sample_number),
        image_id=None if image_id is None else str(image_id),
        question=question,
        answers=tuple(answers),
        setting=KnobSetting(named["tier"], named["top_k"], named["num_active_blocks"]),
        tier_crops=tier_crops,
        answer=_field(entry, "pred", where, str),
        accuracy=accuracy,
        num_crops=_count(entry, "actual_num_crops", where, 1),
        vision_tokens=_count(entry, "actual_vision_tokens", where, 1),
        text_tokens=_count(entry, "actual_text_tokens", where, 1),
        output_tokens=_count(entry, "output_tokens", where, 1),
        vision_ms=times["T_vision_total"],
        llm_prefill_ms=times["T_LLM_prefill"],
        decode_ms_per_token=times["T_decode_per_token"],
        total_ms=times["T_total"],
        file=f"{file.parent.name}/{file.name}",
    )


def _check_named(named: Mapping[str, Any], fields: Mapping[str, Any], where: str):
    for name, value in named.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"{where}, field '{name}': it is {fields[name]!r}, but {value!r} by the name of the file: one of them is "
                "wrong."
            )


def _field(fields: Mapping[str, Any], name: str, where: str, kind: type | None = None) -> Any:
    if name not in fields:
        raise ValueError(f"{where} has no field '{name}': record it again, or take the file out.")
    if kind is not None and not isinstance(fields[name], kind):
        raise ValueError(f"{where}, field '{name}': {fields[name]!r} is not a {kind.__name__}.")
    return fields[name]


def _number(fields: Mapping[str, Any], name: str, where: str) -> float:
    value = _field(fields, name, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}, field '{name}': {value!r} is not a number.")
    return float(value)


def _count(fields: Mapping[str, Any], name: str, where: str, minimum: int) -> int:
    value = _number(fields, name, where)
    if not value.is_integer() or value < minimum:
        raise ValueError(f"{where}, field '{name}': {value:g} is not a whole number of {minimum} or more.")
    return int(value)


def _time(fields: Mapping[str, Any], name: str, where: str) -> float:
    value = _number(fields, name, where)
    if value <= 0:
        raise ValueError(f"{where}, field '{name}': {value:g} ms is not a time: it must be above 0.")
    return value


def tier_crops_of(measurements: Sequence[RecordedMeasurement]) -> dict[str, tuple[int, int]]:
    """
    Crop range of each tier, cheapest first.

    Raises:
        ValueError: If a tier means something else in one data set than in another.
    """
    found: dict[str, RecordedMeasurement] = {}
    for measurement in measurements:
        first = found.setdefault(measurement.setting.tier, measurement)
        if first.tier_crops != measurement.tier_crops:
            raise ValueError(
                f"tier '{measurement.setting.tier}' has {list(first.tier_crops)} crops in '{first.file}', but "
                f"{list(measurement.tier_crops)} in '{measurement.file}': import these data sets one by one."
            )
    return {tier: found[tier].tier_crops for tier in TIERS if tier in found}

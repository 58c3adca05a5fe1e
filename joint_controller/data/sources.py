"""Where rows come from: the Hub, a folder written by `save_to_disk`, Parquet files, or a data set's official files."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from .official_files import OFFICIAL_FILES, find_official_split, read_official_split
from .registry import VQA_DATASETS, VQADataset
from .schema import DEFAULT_QUESTION_TYPE, ENCODED_FEATURES, SPLITS, cache_folder
from .splits import ROLES, SplitPart, is_image_in_part, select_part, select_rows


logger = logging.getLogger(__name__)

CONVERSION_VERSION = 1
"""Raise it when a published row becomes another row than before, so that no cached one is taken for it."""

ENCODED_IMAGE = Image(decode=False)

SOURCE_FEATURES = Features({**ENCODED_FEATURES, "defect": Value("string")})
"""Columns of a named data set: those of `FEATURES`, images not decoded, and `defect`: why the row cannot be used, `None`
where it can."""

NUM_STREAMING_SHARDS = 64
"""Into how many parts at most a table that lies on disk is streamed: enough for the workers of one machine."""

STREAMING_BATCH_SIZE = 16
"""Published rows, images included, that streaming holds at once."""

FIRST_ROWS_THREADS = 16

_FILE_SPLIT = re.compile(r"(train2014|train|validation|val2014|val|testdev|test|dev)(?![A-Za-z0-9])")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")

_ROW = "__published_row__"
_IMAGE_KEY = "__image_key__"
_CONVERTED_FEATURES = Features(
    {
        **{name: feature for name, feature in SOURCE_FEATURES.items() if name != "image"},
        _ROW: Value("int64"),
        _IMAGE_KEY: Value("string"),
    }
)


def read_source(name_or_path: str, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """
    Reads a split of a data set of visual questions as it is: rows are not checked and images not decoded.

    Args:
        name_or_path (`str`):
            - A name of `VQA_DATASETS`, such as `"text_vqa"`: its repository on the Hub.
            - `"<name>=<path>"`: that data set in a local file or folder: written by `save_to_disk`; Parquet files as
              published (in the folder, or its `data` or the configuration's folder); or, for data sets of
              `OFFICIAL_FILES`, the official JSON files and image folders.
            - A path of the same kinds, but official files, with the columns of `FEATURES` or some of them.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"`, `"test"`, or another published split by its name. `"validation[:50%]"` is the
            part of the split with about half of its images, `"validation[50%:]"` the rest of them (see
            [`SplitPart.contains`]).
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows when they are asked for, in place of making a table of them first. Rows, ids and
            their order are the same.

    Returns:
        `datasets.Dataset` or, if streaming, `datasets.IterableDataset`: Of a named data set, the columns of
        `SOURCE_FEATURES`; `sample_id` is "<name>/<published split>/<published id, or number of the row>". Of a path,
        the columns that it has, `sample_id` being "<folder or file>/<split>/<row>" where there was none.

    Raises:
        ValueError: If the data set or split does not exist, has no answers, has not the published columns, or cannot
            be read. The message names what was looked for, and where.
    """
    part = SplitPart.parse(split)
    entry, path = _parse_name(name_or_path)
    rows = _read_own(path, part, streaming) if entry is None else _read_published(entry, path, part, streaming)
    if streaming and isinstance(rows, Dataset):
        return rows.to_iterable_dataset(num_shards=min(NUM_STREAMING_SHARDS, len(rows)))
    return rows


def _read_published(
    entry: VQADataset, path: Path | None, part: SplitPart, streaming: bool
) -> Dataset | IterableDataset:
    """Reads a split of a named data set, from the Hub where no path is given."""
    role = ROLES.get(part.name, part.name)
    if role not in entry.splits:
        without = {role: " (without answers)" for role in entry.unlabelled}
        splits = ", ".join(f"'{name}'{without.get(role, '')}" for role, name in entry.splits.items())
        raise ValueError(
            f"data set '{entry.name}' has no split '{part.name}': it was published with {splits}. {_part_hint(entry)}"
        )
    if path is None:
        where, published = f"'{entry.repository}' on the Hub", _read_hub(entry, role, streaming)
    else:
        where = f"'{path}'"
        entry, published = _read_folder(entry, path, role, streaming)
    if isinstance(published, IterableDataset):
        rows = _convert_streamed(entry, role, published, part)
    else:
        rows = _convert_table(entry, role, published, part, where)
    if role in entry.unlabelled and not any(answer and answer.strip() for answer in next(iter(rows))["answers"]):
        raise _no_answers(entry, role)
    return rows


# ---- where to look --------------------------------------------------------------------------------------------------


def _parse_name(name_or_path: str) -> tuple[VQADataset | None, Path | None]:
    """The entry that is named, and the path that is given."""
    if name_or_path in VQA_DATASETS:
        return VQA_DATASETS[name_or_path], None
    name, equals, path = name_or_path.partition("=")
    if equals and name in VQA_DATASETS:
        if not Path(path).expanduser().exists():
            raise ValueError(f"there is no file or folder '{path}' for data set '{name}'.")
        return VQA_DATASETS[name], Path(path).expanduser()
    if not Path(name_or_path).expanduser().exists():
        unknown = f" ('{name}' is not a known name)" if equals else ""
        raise ValueError(
            f"there is no data set '{name_or_path}'{unknown}: give 'easy_vqa', 'scenes', 'scenes_transfer', one of {list(VQA_DATASETS)} "
            "(from the Hub), '<name>=<path>' for one of these in a local folder, or the path of a folder written by "
            "`save_to_disk`, of a Parquet file, or of a folder of Parquet files."
        )
    return None, Path(name_or_path).expanduser()


def _no_answers(entry: VQADataset, role: str) -> ValueError:
    return ValueError(
        f"split '{entry.splits[role]}' of data set '{entry.name}' has no answers: it was published without. "
        f"{_part_hint(entry)}"
    )


def _part_hint(entry: VQADataset) -> str:
    """How to get a split that a data set does not have."""
    labelled = [role for role in entry.splits if role not in entry.unlabelled][-1]
    return f"A split can be a part of another one's images, as '{labelled}[:50%]' and '{labelled}[50%:]' are."


def _read_hub(entry: VQADataset, role: str, streaming: bool) -> Dataset | IterableDataset:
    """Reads a published split from the Hub, or from what `datasets` has of it in its cache."""
    if role in entry.unlabelled:
        raise _no_answers(entry, role)
    if role in entry.not_on_hub:
        on_hub = [name for other, name in entry.splits.items() if other not in entry.not_on_hub]
        raise ValueError(
            f"'{entry.repository}' on the Hub has no split '{role}' of data set '{entry.name}' (it has {on_hub}): give "
            f"a folder that has it, as '{entry.name}=path/to/folder', with {OFFICIAL_FILES[entry.name][role].describe()}."
            + (f" {_part_hint(entry)}" if len(on_hub) > len(entry.unlabelled) else "")
        )
    published = entry.splits[role]
    repository, configuration = entry.repository, entry.configuration
    if role in entry.elsewhere:
        repository, configuration = entry.elsewhere[role], None
    try:
        if not streaming:
            return load_dataset(repository, configuration, split=published)
        builder = load_dataset_builder(repository, configuration)
        return _stream_parquet(builder.config.data_files[published], f"'{repository}' on the Hub", entry, role)
    except _PublishedSchemaError:
        raise
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(
            f"data set '{entry.name}' cannot be read from '{repository}' on the Hub ({cause}): without a "
            f"connection, give a folder that holds it, as '{entry.name}=path/to/folder'."
        ) from error


def _read_folder(
    entry: VQADataset, path: Path, role: str, streaming: bool
) -> tuple[VQADataset, Dataset | IterableDataset]:
    """Reads a published split from a local file or folder, and says in which of its schemas it is."""
    saved, files = _find_saved(path), _find_parquet(path, entry)
    for found in (saved, files):
        names = [name for name in found if ROLES.get(name, name) == role]
        if len(names) > 1:
            raise ValueError(
                f"data set '{entry.name}' in '{path}' has its split '{role}' twice, as {names}: keep one."
            )
        if names and found is saved:
            return entry, _load_saved(path, names[0])
        if names:
            return entry, _load_parquet(path, files[names[0]], streaming, entry, role)
    official = find_official_split(entry.name, role, path)
    if official is not None:
        return official.split.entry, read_official_split(official)
    if role in entry.unlabelled:
        raise _no_answers(entry, role)
    looked_for = [
        f"Parquet files '{entry.splits[role]}*.parquet' in {[str(place) for place in _parquet_folders(path, entry)]}"
    ]
    if role in OFFICIAL_FILES.get(entry.name, {}):
        looked_for.append(f"the official {OFFICIAL_FILES[entry.name][role].describe()}, there or in a folder there")
    has = [*saved, *files]
    raise ValueError(
        f"data set '{entry.name}' in '{path}' has no split '{entry.splits[role]}'{f' (it has {has})' if has else ''}: it was "
        f"looked for as a folder written by `save_to_disk`, as {' and as '.join(looked_for)}. {_part_hint(entry)}"
    )


def _read_own(path: Path, part: SplitPart, streaming: bool) -> Dataset | IterableDataset:
    """Reads a split of a data set in our own schema."""
    saved, files = _find_saved(path), _find_parquet(path, None)
    found = saved or files
    if not found:
        raise ValueError(
            f"there is no data set '{path}': give a folder written by `save_to_disk`, a Parquet file or a folder of "
            "Parquet files. Official files need their name, as 'text_vqa=path/to/folder'."
        )
    name = part.name
    if name not in found:
        names = [other for other in found if ROLES.get(other, other) == ROLES.get(name, name)]
        if len(names) != 1:
            remedy = (
                "save a `DatasetDict` with the splits that you need."
                if saved
                else f"start the names of its Parquet files with '{name}' (files whose names start with none of "
                f"{list(SPLITS)} are 'train')."
            )
            raise ValueError(f"data set '{path}' has no split '{name}' (it has {list(found)}): {remedy}")
        name = names[0]
    prefix = f"{path.resolve().name.removesuffix('.parquet')}/{part.name}"
    rows = _load_saved(path, name) if saved else _load_parquet(path, files[name], streaming, prefix=prefix)
    if isinstance(rows, IterableDataset):
        return rows if part.is_whole else rows.filter(is_image_in_part, fn_kwargs={"part": part})
    if isinstance(rows.features.get("image"), Image):
        rows = rows.cast_column("image", ENCODED_IMAGE)
    if "sample_id" not in rows.column_names:
        rows = rows.add_column("sample_id", [f"{prefix}/{row:06d}" for row in range(len(rows))])
    return select_part(rows, part, str(path))


# ---- folders written by `save_to_disk` ------------------------------------------------------------------------------


def _find_saved(path: Path) -> list[str]:
    """Names of the splits of a folder written by `save_to_disk`; none if it is another folder."""
    splits, state = path / "dataset_dict.json", path / "state.json"
    if splits.is_file():
        return json.loads(splits.read_text(encoding="utf-8"))["splits"]
    if state.is_file():
        # One that was loaded as "validation[:10%]" is still of the split `validation`.
        split = json.loads(state.read_text(encoding="utf-8")).get("_split") or "train"
        return [split.partition("[")[0]]
    return []


def _load_saved(path: Path, split: str) -> Dataset:
    return load_from_disk(str(path / split if (path / "dataset_dict.json").is_file() else path))


# ---- Parquet files --------------------------------------------------------------------------------------------------


def _parquet_folders(path: Path, entry: VQADataset | None) -> list[Path]:
    """Folders in which a repository has Parquet files, and the folder itself."""
    names = ["data"] if entry is None or entry.configuration is None else [entry.configuration, "data"]
    return [folder for folder in (*(path / name for name in names), path) if folder.is_dir()]


def _find_parquet(path: Path, entry: VQADataset | None) -> dict[str, list[Path]]:
    """The Parquet files of each split, in order: those of the first folder that has some."""
    folders = _parquet_folders(path, entry)
    candidates = [[path]] if path.is_file() else [sorted(folder.glob("*.parquet")) for folder in folders]
    splits: dict[str, list[Path]] = {}
    for file in next((files for files in candidates if files), []):
        if file.suffix == ".parquet":
            match = _FILE_SPLIT.match(file.name)
            name = match[1] if match else next((name for name in SPLITS if file.name.startswith(name)), "train")
            splits.setdefault(name, []).append(file)
    for name, files in splits.items():
        shards = [match for file in files if (match := _SHARD.search(file.name))]
        if shards and len(shards) != int(shards[0][2]):
            logger.warning(
                "'%s' has %d of the %s Parquet files of '%s'.", files[0].parent, len(shards), shards[0][2], name
            )
    return splits


def _load_parquet(
    path: Path,
    files: list[Path],
    streaming: bool,
    entry: VQADataset | None = None,
    role: str | None = None,
    prefix: str = "",
) -> Dataset | IterableDataset:
    """Reads Parquet files: of a named data set the columns that are needed, else all."""
    names = [str(file) for file in files]
    try:
        if streaming:
            return _stream_parquet(names, f"'{path}'", entry, role, prefix)
        if entry is None:
            return Dataset.from_parquet(names)
        _check_published(entry, role, _read_features(names[0]), f"'{path}'")
        return Dataset.from_parquet(names, columns=list(entry.columns))
    except _PublishedSchemaError:
        raise
    # A ValueError is what `datasets` and Arrow raise for files without rows and for files of other kinds.
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(
            f"data set '{path}' cannot be read ({cause}): its Parquet files must be whole, hold rows and "
            "have one schema."
        ) from error


def _stream_parquet(
    files: Sequence[str],
    where: str,
    entry: VQADataset | None = None,
    role: str | None = None,
    prefix: str = "",
) -> IterableDataset:
    """
    Rows of Parquet files, local or on the Hub, as they are asked for, whichever process reads a file, and in whichever
    order. Those of a named data set come with their number in the split, others with an id made of it if they have none.
    """
    features = _read_features(files[0])
    if entry is not None:
        _check_published(entry, role, features, where)
        features = Features({column: features[column] for column in entry.columns})
    with ThreadPoolExecutor(FIRST_ROWS_THREADS) as pool:
        num_rows = list(pool.map(_count_rows, files))
    if not sum(num_rows):
        raise ValueError("there are no rows")
    first_rows = [sum(num_rows[:index]) for index in range(len(files))]
    number = {"sample_id": Value("string")} if entry is None else {_ROW: Value("int64")}
    encoded = {name: ENCODED_IMAGE if isinstance(feature, Image) else feature for name, feature in features.items()}
    return IterableDataset.from_generator(
        _iterate_parquet,
        features=Features({**number, **encoded}),
        gen_kwargs={
            "files": list(files),
            "first_rows": first_rows,
            "columns": tuple(features),
            "prefix": prefix if entry is None else None,
        },
    )


def _read_features(file: str) -> Features:
    with fsspec.open(file) as opened:
        return Features.from_arrow_schema(pq.read_schema(opened))


def _count_rows(file: str) -> int:
    with fsspec.open(file) as opened:
        return pq.ParquetFile(opened).metadata.num_rows


def _iterate_parquet(
    files: list[str], first_rows: list[int], columns: tuple[str, ...], prefix: str | None
) -> Iterator[dict[str, Any]]:
    for file, row in zip(files, first_rows, strict=True):
        with fsspec.open(file) as opened:
            for batch in pq.ParquetFile(opened).iter_batches(STREAMING_BATCH_SIZE, columns=list(columns)):
                for values in batch.to_pylist():
                    yield {_ROW: row, **values} if prefix is None else {"sample_id": f"{prefix}/{row:06d}", **values}
                    row += 1


# ---- from published rows to ours ------------------------------------------------------------------------------------


class _PublishedSchemaError(ValueError):
    pass


def _check_published(entry: VQADataset, role: str | None, features: Mapping[str, Any], where: str) -> None:
    """Refuses a table that does not have the published columns."""
    for column, expected in entry.columns.items():
        if column not in features:
            if role in entry.unlabelled and column in ("answers", "answer"):
                raise _PublishedSchemaError(str(_no_answers(entry, role)))
            raise _PublishedSchemaError(
                f"data set '{entry.name}' in {where} has no column '{column}' (it has {sorted(features)}): give it as "
                f"it was published, with the columns {list(entry.columns)}, or give the path alone if the data set is "
                "in a schema of your own."
            )
        if not _has_type(features[column], expected):
            raise _PublishedSchemaError(
                f"data set '{entry.name}' in {where}, column '{column}' has the type {features[column]}: it was "
                f"published as {expected}."
            )


def _has_type(actual: Any, expected: Any) -> bool:
    """Whether a column holds what the published one does: of any width, and numbers, which are ids or counts, as strings."""
    if isinstance(expected, Image):
        return isinstance(actual, Image) or (isinstance(actual, dict) and set(actual) == {"bytes", "path"})
    if isinstance(expected, List):
        return isinstance(actual, List) and _has_type(actual.feature, expected.feature)
    if isinstance(expected, dict):
        return isinstance(actual, dict) and all(
            name in actual and _has_type(actual[name], feature) for name, feature in expected.items()
        )
    return isinstance(actual, Value) and _kind(actual.dtype) == _kind(expected.dtype)


def _kind(dtype: str) -> str:
    kind = re.sub(r"^(large_|u)|\d+$", "", dtype)
    return "string" if kind == "int" else kind


def _convert_table(entry: VQADataset, role: str, published: Dataset, part: SplitPart, where: str) -> Dataset:
    """Makes our columns of the published ones. Texts are written to the cache, images stay where they are."""
    if not len(published):
        raise ValueError(f"data set '{entry.name}' in {where} has no rows in '{entry.splits[role]}'.")
    _check_published(entry, role, published.features, where)
    fingerprint = Hasher.hash((published._fingerprint, entry.name, role, CONVERSION_VERSION))
    folder = cache_folder()
    texts = published.select_columns(entry.text_columns).map(
        _convert_batch,
        with_indices=True,
        batched=True,
        remove_columns=entry.text_columns,
        features=_CONVERTED_FEATURES,
        fn_kwargs={"entry": entry, "role": role},
        cache_file_name=str(folder / f"rows-{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc=f"Reading '{entry.name}' ({entry.splits[role]})",
    )
    if not len(texts):
        raise ValueError(f"data set '{entry.name}' in {where} has no questions in '{entry.splits[role]}'.")
    images = published.select_columns(entry.image_column)
    if entry.image_column != "image":
        images = images.rename_column(entry.image_column, "image")
    images = images.cast_column("image", ENCODED_IMAGE)
    if entry.questions_column is not None:
        # Here alone images are copied, since a table has one image a row.
        images = images.select(texts[_ROW][:]).flatten_indices(
            cache_file_name=str(folder / f"images-{fingerprint}.arrow"),
            writer_batch_size=STREAMING_BATCH_SIZE,
            new_fingerprint=f"{fingerprint}-images",
        )
    rows = concatenate_datasets([texts.remove_columns([_ROW, _IMAGE_KEY]), images], axis=1)
    rows = rows.select_columns(list(SOURCE_FEATURES))
    if part.is_whole:
        return rows
    chosen = [
        row
        for row, key in enumerate(texts[_IMAGE_KEY][:])
        if (part.contains(key) if key is not None else is_image_in_part(images[row], part))
    ]
    return select_rows(rows, chosen, part, entry.name)


def _convert_streamed(entry: VQADataset, role: str, published: IterableDataset, part: SplitPart) -> IterableDataset:
    rows = published.map(
        _convert_streamed_batch,
        batched=True,
        batch_size=STREAMING_BATCH_SIZE,
        remove_columns=list(published.features),
        features=Features({**_CONVERTED_FEATURES, "image": ENCODED_IMAGE}),
        fn_kwargs={"entry": entry, "role": role},
    )
    if not part.is_whole:
        rows = rows.filter(_is_row_in_part, fn_kwargs={"part": part})
    return rows.select_columns(list(SOURCE_FEATURES))


def _is_row_in_part(row: Mapping[str, Any], part: SplitPart) -> bool:
    key = row[_IMAGE_KEY]
    return part.contains(key) if key is not None else is_image_in_part(row, part)


def _convert_streamed_batch(batch: Mapping[str, list[Any]], entry: VQADataset, role: str) -> dict[str, list[Any]]:
    numbers = batch[_ROW]
    converted = _convert_batch(batch, numbers, entry, role)
    positions = {number: position for position, number in enumerate(numbers)}
    converted["image"] = [batch[entry.image_column][positions[number]] for number in converted[_ROW]]
    return converted


def _convert_batch(
    batch: Mapping[str, list[Any]], numbers: Sequence[int], entry: VQADataset, role: str
) -> dict[str, list[Any]]:
    """Our rows of published ones: texts alone, with the number of the published row that each is of."""
    converted = {column: [] for column in _CONVERTED_FEATURES}
    for position, number in enumerate(numbers):
        published = {column: batch[column][position] for column in entry.text_columns}
        if entry.questions_column is None:
            questions = [entry.convert(published, number)]
        else:
            listed = published.pop(entry.questions_column) or []
            questions = [
                entry.convert({**published, **question}, f"{number}-{index}") for index, question in enumerate(listed)
            ]
        for row in questions:
            converted["sample_id"].append(f"{entry.name}/{entry.splits[role]}/{row['id']}")
            converted["question"].append(row["question"])
            converted["answers"].append(row["answers"] or [])
            converted["style"].append(row.get("style", entry.style))
            converted["metric"].append(row.get("metric", entry.metric))
            converted["question_type"].append(row.get("question_type") or DEFAULT_QUESTION_TYPE)
            converted["defect"].append(row.get("defect"))
            converted[_ROW].append(number)
            converted[_IMAGE_KEY].append(row.get("image_key"))
    return converted

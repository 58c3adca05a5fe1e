"""Keeps the timings of a profile that is being made, so that nothing is lost however the process ends."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..executor import StageTimes


JOURNAL_FILE = "timings.jsonl"
"""Name of the journal in the folder of a profile; it is there until the profile is whole."""


class ProfileJournal:
    """
    The timings of an unfinished profile, by number of the measurement and of the repeat: a file of JSON lines, the
    first of which (`plan`) says what is being measured, on what. A timing is handed to the operating system as soon as
    it was taken, so that a process that is killed loses none but the one it was taking; a line that was cut short is
    dropped when the journal is opened again. A journal of something else, or one that is damaged, is refused
    (`ValueError`).
    """

    def __init__(self, path: str | Path, plan: Mapping[str, Any]):
        self.path = Path(path)
        self.timings: dict[tuple[int, int], StageTimes] = {}
        self.num_measurements: int | None = None
        plan = json.loads(json.dumps(plan))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._read(json.loads(line), plan)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"'{self.path}', line {number}, is damaged ({type(error).__name__}: {error}): delete the line, and what "
                    "it held is measured again."
                ) from error
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(len(whole))
        if not whole:
            self._write({"plan": plan})

    def _read(self, entry: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
        if "plan" in entry:
            for key, value in plan.items():
                if entry["plan"].get(key) != value:
                    raise ValueError(
                        f"'{self.path}' holds the timings of another profile: its {key} is {_short(entry['plan'].get(key))}, "
                        f"here {_short(value)}. Go on with the same arguments on the same machine, or delete it to begin "
                        "anew."
                    )
        elif "num_measurements" in entry:
            self.num_measurements = entry["num_measurements"]
        else:
            self.timings[entry["measurement"], entry["repeat"]] = StageTimes(**entry["times"])

    def settle(self, num_measurements: int) -> None:
        """Settles on how many measurements there will be."""
        self.num_measurements = num_measurements
        self._write({"num_measurements": num_measurements})

    def add(self, measurement: int, repeat: int, times: StageTimes) -> None:
        """Keeps a timing."""
        self.timings[measurement, repeat] = times
        self._write({"measurement": measurement, "repeat": repeat, "times": asdict(times)})

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")

    def __enter__(self) -> "ProfileJournal":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."

"""How an executor is run, which its latencies are those of: on what device, with how many threads, in which mode."""

import hashlib
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from ..executor import Executor, executor_family
from ..version import __version__
from .profile_table import UNKNOWN


_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")

_PACKAGE = Path(__file__).parents[1]
# What every request runs through, whatever the executor's family.
_COMMON_CODE = (
    *("controller", "decisions.py", "executor", "images.py", "request_path.py"),
    *("latency/guardrail.py", "latency/modeling_latency_estimator.py", "latency/request_costs.py"),
)


@dataclass(frozen=True)
class WayOfRunning:
    """
    What the latencies of an executor depend on, besides its sizes.

    Args:
        device_type (`str`):
            `"cpu"` or `"cuda"`.
        device_name (`str`):
            Model of the GPU or CPU.
        driver_version (`str`):
            The GPU's driver; `"none"` for a CPU, `"unknown"` where the machine does not say.
        num_threads (`int` or `None`):
            Threads that share one operation on the CPU; `None` for a GPU.
        executor_mode, executor_dtype (`str`):
            [`Executor.mode`] and [`Executor.dtype`].
        library_versions (`str`):
            Libraries that requests run through, e.g. `"torch 2.13.0, transformers 5.24.0"`.
        executor_revision (`str`):
            Version of the code, see [`~latency.way_of_running.executor_revision`].
    """

    device_type: str
    device_name: str
    driver_version: str
    num_threads: int | None
    executor_mode: str
    executor_dtype: str
    library_versions: str
    executor_revision: str

    @classmethod
    def of(cls, executor: Executor) -> "WayOfRunning":
        """How an executor runs here and now."""
        device = executor.device
        return cls(
            device_type=device.type,
            device_name=device_name(device),
            driver_version=driver_version(device),
            num_threads=None if device.type == "cuda" else torch.get_num_threads(),
            executor_mode=executor.mode,
            executor_dtype=executor.dtype,
            library_versions=library_versions(),
            executor_revision=executor_revision(executor.model_type),
        )

    def incomparable(self, here: "WayOfRunning") -> str:
        """In what another way differs so that latencies of the one say nothing about the other: device type, mode, precision,
        threads. In words, e.g. `"mode onednn there, plain here"`; empty where all are equal."""
        return self._differences(here, ("device_type", "executor_mode", "executor_dtype", "num_threads"))

    def differences(self, here: "WayOfRunning") -> str:
        """In what else another way differs, which may change latencies by a factor: device, driver, versions. In words; empty
        where all are equal."""
        return self._differences(here, ("device_name", "driver_version", "library_versions", "executor_revision"))

    def _differences(self, here: "WayOfRunning", names: Sequence[str]) -> str:
        return "; ".join(
            f"{name.removeprefix('executor_').removeprefix('num_').replace('_', ' ')} {getattr(self, name)} there, "
            f"{getattr(here, name)} here"
            for name in names
            if getattr(self, name) != getattr(here, name)
        )


def device_name(device: torch.device) -> str:
    """Model of a GPU, or of the CPU, e.g. `"AMD EPYC 7B13"`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # Linux keeps the model of the CPU here only; elsewhere `platform` knows it.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if models:
            return models[0].strip()
    return platform.processor() or platform.machine()


def driver_version(device: torch.device) -> str:
    """Version of the driver of a CUDA device; `"none"` for a CPU, `"unknown"` where the machine does not say."""
    if device.type != "cuda":
        return "none"
    module = Path("/sys/module/nvidia/version")
    if module.exists():
        return module.read_text().strip()
    if shutil.which("nvidia-smi") is None:
        return UNKNOWN
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else UNKNOWN


def library_versions() -> str:
    """Libraries that requests run through, with their versions."""
    versions = {name: version(name) for name in _LIBRARIES} | {"torch": torch.__version__}  # with its build
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def executor_revision(model_type: str) -> str:
    """
    Version of the code that the latency of a family's executors depends on: the package's, and a digest of the sources that
    requests run through, those of the family included, e.g. `"0.2.0+1f3b9c02a7d4"`.
    """
    places = (*(_PACKAGE / name for name in _COMMON_CODE), *executor_family(model_type).code_folders)
    files = sorted(
        (file.relative_to(place.parent).as_posix(), file)
        for place in places
        for file in ([place] if place.is_file() else place.rglob("*.py"))
    )
    digest = hashlib.sha256()
    for name, file in files:
        digest.update(f"{name}\n".encode() + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"

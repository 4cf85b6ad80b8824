"""What a run was made on and of: machine, load, versions, hashes; and what no run may keep.

Reads the system, never a model. What cannot be read is left out: nothing is guessed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from penstock import __version__, hardware
from penstock.errors import ConfigError

PACKAGES: Final = (
    "datasets",
    "httptools",
    "llama-cpp-python",
    "lm-eval",
    "msgspec",
    "numpy",
    "openvino-genai",
    "rouge-score",
    "sacrebleu",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "uvloop",
    "vllm",
)
HIDDEN: Final = "***"
_BUSY_CORES: Final = 0.05  # of one process, to be named
_DISTURBING_CORES: Final = 0.25  # of all others together, to be told
_CACHED_FROM_BYTES: Final = 2**20
_SECRET_WORDS: Final = re.compile(
    r"key|secret|passw|credential|bearer|authorization|signature", re.I
)
_NAMED_VALUE: Final = re.compile(r"(?P<name>[\w.-]+)=(?P<value>[^&;,\s]+)")
# A password may hold a slash, or an `@` that somebody forgot to escape.
_USER: Final = re.compile(r"(?<=://)(?:[^/@\s:]*:\S*|[^/@\s]+)@")
_LOOKS_SECRET: Final = re.compile(
    r"\b(?:sk|pk|rk|hf|gsk|xai|ghp|glpat|nvapi)[-_][\w-]{12,}|(?<=[Bb]earer )\S+"
)


def capture(*, interval_s: float = 0.1) -> dict[str, Any]:
    """The machine, what else runs on it, and the versions of what measures: for `Header`.

    Args:
        interval_s: how long to watch what other processes use.
    """
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "memory": _memory(),
        "load": _load(interval_s),
        "gpus": _gpus(),
        "system": _system(),
        "packages": _packages(),
    }
    return {name: value for name, value in found.items() if value}


def busy_note(environment: Mapping[str, Any]) -> str | None:
    """What to know of a machine that others used when a run began; None: it was quiet.

    Args:
        environment: as `capture` made it, from a run's header.
    """
    load = environment.get("load")
    cores = load.get("busy_cores", 0.0) if isinstance(load, Mapping) else 0.0
    if not isinstance(load, Mapping) or cores < _DISTURBING_CORES:
        return None
    names = ", ".join(f"{one['name']} {one['cores']:.2g}" for one in load.get("busiest", []))
    of = environment.get("cpu", {}).get("num_usable_cores")
    return (
        f"The machine was busy when the run began: other processes used {cores:.2g} "
        f"{f'of {of} cores' if of else 'cores'} ({names}). Times may be longer, and differ more, "
        "than on a quiet one."
    )


def redact(argv: Sequence[str]) -> list[str]:
    """A command line without its secrets: they become `***`.

    These are values of options whose name has a word such as key, token, secret or password (not
    `--max-tokens`, and not `--api-key-env`, which names a variable), of headers, of such names in
    URLs, a URL's user and password, and what looks like a known provider's key.
    """
    told: list[str] = []
    hide: str | None = None  # how the value that follows is hidden
    for word in argv:
        if hide is not None and not (hide == "option" and word.startswith("--")):
            told.append(_redact_header(word) if hide == "header" else HIDDEN)
            hide = None
            continue
        hide = None
        name, equals, value = word.partition("=")
        is_header = name in ("--header", "-H")
        if is_header and equals:
            told.append(f"{name}={_redact_header(value)}")
        elif word.startswith("-H") and len(word) > 2:
            told.append("-H" + _redact_header(word[2:]))
        else:
            is_secret = word.startswith("-") and _is_secret(name)
            if not equals and word.startswith("-"):
                hide = "header" if is_header else "option" if is_secret else None
            told.append(f"{name}={HIDDEN}" if equals and is_secret else redact_text(word))
    return told


def redact_text(text: str) -> str:
    """A URL, or another text, without the secrets in it."""
    text = _USER.sub(f"{HIDDEN}@", text)
    text = _NAMED_VALUE.sub(
        lambda found: f"{found['name']}={HIDDEN}" if _is_secret(found["name"]) else found[0], text
    )
    return _LOOKS_SECRET.sub(HIDDEN, text)


def _redact_header(header: str) -> str:
    """`Authorization: ***`: of a header only its name is kept."""
    name, colon, _ = header.partition(":")
    return f"{name}: {HIDDEN}" if colon else HIDDEN


def _is_secret(name: str) -> bool:
    """Whether an option or a parameter of this name holds a secret."""
    words = [word for word in re.split(r"[-_.]+", name.lower()) if word]
    if not words or words[-1] == "env":
        return False
    return any(
        word in ("token", "auth", "sig", "pwd") or _SECRET_WORDS.search(word) for word in words
    )


def hash_file(path: Path) -> str:
    """SHA-256 of a file. Of a large one it is remembered while its size and time stay.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        told = path.stat()
        if told.st_size < _CACHED_FROM_BYTES:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        known = _remembered(path)
        # The time of the last change cannot be put back, as that of the last writing can.
        times = [told.st_mtime_ns, told.st_ctime_ns]
        stamp = [str(path.resolve()), told.st_size, *times, told.st_ino]
        if known is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                entry = json.loads(known.read_bytes())
                if entry["of"] == stamp:
                    return str(entry["sha256"])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}.") from None
    if known is not None:
        _remember(known, {"of": stamp, "sha256": found})
    return found


def hash_directory(path: Path) -> str:
    """SHA-256 over the sorted lines `<sha256>  <relative path>` of the files of a directory.

    The same as `find . -type f | sort | xargs sha256sum | sha256sum` gives, but for `./`.

    Raises:
        ConfigError: it is no directory, or a file in it cannot be read.
    """
    if not path.is_dir():
        raise ConfigError(f"`{path}` is no directory.")
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    lines = [f"{hash_file(files[name])}  {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts, each behind its length: no two lists of texts have the same bytes."""
    made = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        made.update(len(data).to_bytes(8, "little") + data)
    return made.hexdigest()


def _remembered(path: Path) -> Path | None:
    """Where the hash of a file is kept; None: there is no cache directory."""
    root = os.environ.get("PENSTOCK_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(root) if root else Path(caches, "penstock")
    if not directory.is_absolute() and not root:
        return None
    name = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    return directory / "hashes" / f"{name[:32]}.json"


def _remember(known: Path, entry: dict[str, Any]) -> None:
    """Whole or not at all; a cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=known.parent, delete=False) as file:
            file.write(json.dumps(entry).encode())
        os.replace(file.name, known)


def _cpu() -> dict[str, Any]:
    megahertz = [
        float(found) for found in re.findall(r"^cpu MHz\s*: ([\d.]+)", _text("/proc/cpuinfo"), re.M)
    ]
    policy = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    return _there(
        name=hardware.cpu_name(),
        features=hardware.cpu_features(),
        num_usable_cores=hardware.num_usable_cores(),
        num_logical_cores=os.cpu_count(),
        governor=_text(policy / "scaling_governor").strip(),
        frequency_mhz=[min(megahertz), max(megahertz)] if megahertz else None,
        no_turbo=_text("/sys/devices/system/cpu/intel_pstate/no_turbo").strip(),
        virtual=bool(re.search(r"^flags\s*:.*\bhypervisor\b", _text("/proc/cpuinfo"), re.M)),
    )


def _memory() -> dict[str, Any]:
    told = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text("/proc/meminfo"), re.M))
    sizes = {name: int(value) * 1024 for name, value in told.items()}
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    swapped = sizes.get("SwapTotal", 0) - sizes.get("SwapFree", 0)
    return _there(
        total_bytes=sizes.get("MemTotal"),
        available_bytes=hardware.available_memory_bytes(),
        container_limit_bytes=int(limit) if limit.isdigit() else None,
        swap_used_bytes=swapped or None,
        transparent_huge_pages="".join(
            re.findall(r"\[(\w+)\]", _text("/sys/kernel/mm/transparent_hugepage/enabled"))
        ),
    )


def _load(interval_s: float) -> dict[str, Any]:
    """What else the machine does: of processes only names, never their arguments."""
    from psutil import Process, process_iter

    this = Process()
    relatives = [*this.parents(), *this.children(recursive=True)]  # an engine started here too
    own = {this.pid, *(relative.pid for relative in relatives)}

    def used() -> dict[int, tuple[str, float]]:
        found = {}
        for process in process_iter(["name", "cpu_times"]):
            times = process.info["cpu_times"]
            if times is not None and process.pid not in own:
                found[process.pid] = (process.info["name"], times.user + times.system)
        return found

    before, began_s = used(), time.perf_counter()
    time.sleep(interval_s)
    after, took_s = used(), time.perf_counter() - began_s
    busy = sorted(
        ((seconds - before[pid][1]) / took_s, name)
        for pid, (name, seconds) in after.items()
        if pid in before
    )
    busy = [(cores, name) for cores, name in reversed(busy) if cores >= _BUSY_CORES]
    average = os.getloadavg() if hasattr(os, "getloadavg") else None
    return _there(
        average=[round(value, 2) for value in average] if average else None,
        num_busy_processes=len(busy),
        busy_cores=round(sum(cores for cores, _ in busy), 2),
        busiest=[{"name": name, "cores": round(cores, 2)} for cores, name in busy[:5]],
    )


def _gpus() -> list[dict[str, Any]]:
    """What NVML tells of each GPU; nothing where it or a driver is missing."""
    if not hardware.has_nvidia_device():
        return []
    try:
        import pynvml
    except ModuleNotFoundError:
        return [{"driver": hardware.nvidia_driver(), "reason": "pynvml is not installed"}]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [{"driver": hardware.nvidia_driver(), "reason": str(error)}]
    try:
        return [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    found: dict[str, Any] = {}
    for name, read in {
        "name": lambda: nvml.nvmlDeviceGetName(handle),
        "driver": nvml.nvmlSystemGetDriverVersion,
        "memory_total_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
        "memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, 0),
        "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "num_processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
    }.items():
        with contextlib.suppress(nvml.NVMLError):  # a virtual GPU does not tell everything
            value = read()
            found[name] = value.decode() if isinstance(value, bytes) else value
    return found


def _system() -> dict[str, Any]:
    container = any(Path(path).exists() for path in ("/.dockerenv", "/run/.containerenv"))
    return _there(
        kernel=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        python=platform.python_version(),
        container=container or "KUBERNETES_SERVICE_HOST" in os.environ,
    )


def _packages() -> dict[str, str]:
    found = {"penstock": __version__}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _there(**facts: Any) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value not in (None, "", [])}


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

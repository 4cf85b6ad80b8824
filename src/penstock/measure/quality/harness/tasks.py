"""Tasks of lm-evaluation-harness by name, with their data from local files.

Owns how lm-eval finds a task and what is refused: what would need the network, unless the user
asked for it. A task's own definition is never changed but for where its data comes from, and
every such change is told in `LoadedTasks.notes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.measure.quality.harness.datasets import find
from penstock.measure.quality.harness.surroundings import stay_offline

# Folders of lm-eval's tasks by the first word of a name: to scan all 13,000 files takes seconds.
FOLDERS = {
    "arc": ("arc",),
    "ai2": ("arc",),
    "gsm8k": ("gsm8k",),
    "hellaswag": ("hellaswag",),
    "ifeval": ("ifeval",),
    "lambada": ("lambada",),
    "leaderboard": ("leaderboard",),
    "mmlu": ("mmlu/default",),
    "openllm": (
        *("benchmarks", "arc", "gsm8k", "hellaswag", "mmlu/default", "truthfulqa", "winogrande"),
    ),
    "truthfulqa": ("truthfulqa",),
    "wikitext": ("wikitext",),
    "wikitext2": ("wikitext",),
    "winogrande": ("winogrande",),
}
# Tasks of our own, made of one of lm-eval's.
DERIVED: dict[str, dict[str, Any]] = {
    "wikitext2_unk": {
        "base": "wikitext",
        "config": {"dataset_path": "penstock/wikitext2_unk", "dataset_name": None},
    }
}


@dataclass
class LoadedTasks:
    """What lm-eval evaluates.

    Attributes:
        loaded: lm-eval's own: `tasks` by name, `groups`, `group_map`.
        data_sources: where each task's data came from.
        notes: how a task's scores may differ from the published ones.
    """

    loaded: dict[str, Any]
    data_sources: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def load(
    names: Sequence[str],
    sources: Sequence[Path] = (),
    *,
    include_path: Path | None = None,
    online: bool = False,
) -> LoadedTasks:
    """The tasks, groups and tags of these names.

    Args:
        names: lm-eval's, or of `DERIVED`.
        sources: directories with data, see `datasets`.
        include_path: a folder with task files of one's own.
        online: data that is in no source may be fetched from the hub.

    Raises:
        ConfigError: a name is unknown, a data set is missing, a metric would be downloaded, or a
            task cannot be built.
    """
    if not names:
        raise ConfigError("No task is named.", hint="such as `arc_easy`")
    if not online:
        stay_offline()
    index = _index_for(names, include_path)
    unknown = [name for name in names if name not in index and name not in DERIVED]
    if unknown:
        raise ConfigError(
            f"lm-eval has no task, group or tag `{unknown[0]}`.",
            hint="`lm-eval ls tasks` lists them; own tasks need their folder",
        )
    result = LoadedTasks({})
    manager = _manager(index, _Binder(sources, online, result))
    try:
        specs = [_derived(name, index) if name in DERIVED else name for name in names]
        result.loaded = dict(manager.load(specs))
    except ConfigError:
        raise
    except Exception as error:  # whatever a task's own code raises
        raise _cannot_build(names, error, online) from error
    return result


def _derived(name: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration of a task of `DERIVED`."""
    from lm_eval.tasks._yaml_loader import load_yaml

    changes = DERIVED[name]
    base = load_yaml(index[changes["base"]].yaml_path, resolve_func=True)
    return {**base, **changes["config"], "task": name}


class _Binder:
    """Gives a task's configuration its data before lm-eval builds it."""

    def __init__(self, sources: Sequence[Path], online: bool, result: LoadedTasks) -> None:
        self._sources = sources
        self._online = online
        self._result = result

    def check(self, entry: Any) -> None:
        """Fail before lm-eval imports code that would download at once.

        Raises:
            ConfigError: a task of IFEval without nltk's sentence splitter.
        """
        if self._online or entry.yaml_path is None or "ifeval" not in entry.yaml_path.parts:
            return
        import nltk  # type: ignore[import-untyped]

        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            raise ConfigError(
                f"The task `{entry.name}` needs nltk's data `punkt_tab`, which is not here.",
                hint="`python -m nltk.downloader punkt_tab` fetches it; penstock's own task "
                "`ifeval` needs nothing",
            ) from None

    def bind(self, config: dict[str, Any]) -> dict[str, Any]:
        name = config.get("task")
        path = config.get("dataset_path")
        if not isinstance(name, str) or not isinstance(path, str):
            return config
        _check_metrics(name, config)
        if callable(config.get("custom_dataset")):
            return config
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        found = find(path, config.get("dataset_name"), self._sources)
        if found is None:
            if self._online or files or path in {"json", "csv", "parquet", "text", "arrow"}:
                return config
            raise _missing(name, path, config.get("dataset_name"), self._sources)
        self._result.data_sources[name] = f"{path}: {found.source}"
        if found.note:
            self._result.notes[name] = found.note
        _check_splits(name, config, found.splits)
        splits = found.splits
        bound = {**config, "custom_dataset": lambda **_: splits}
        if callable(config.get("process_docs")):
            bound["process_docs"] = _once(config["process_docs"])
        return bound


def _once(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A task's preparation of its documents, done once for each split.

    lm-eval asks for it again and again, also between prompts and scores, and GPQA's shuffles the
    choices. With data from the hub the file cache of `datasets` gives the first result again.
    """
    made: dict[int, tuple[Any, Any]] = {}

    def processed(split: Any) -> Any:
        if id(split) not in made:
            made[id(split)] = (split, process(split))  # the split is kept, so that its id is
        return made[id(split)][1]

    return processed


def _check_metrics(name: str, config: Mapping[str, Any]) -> None:
    """lm-eval looks for a metric that it does not know on the hub, as code to run."""
    from lm_eval.api.registry import metric_registry

    if config.get("process_results") is not None:
        return
    for entry in config.get("metric_list") or ():
        metric = entry.get("metric")
        if not isinstance(metric, str):
            continue
        if entry.get("hf_evaluate") or metric not in metric_registry:
            raise ConfigError(
                f"The task `{name}` wants the metric `{metric}`, which lm-eval would download as "
                "code from the hub.",
                hint="use a task whose metrics are lm-eval's own",
            )


def _check_splits(name: str, config: dict[str, Any], splits: Mapping[str, Any]) -> None:
    """Fail on a missing split that is evaluated; do without one that only gives examples."""
    needed = config.get("test_split") or config.get("validation_split")
    if needed not in splits:
        raise ConfigError(
            f"The data of task `{name}` has no split `{needed}`; it has `{', '.join(splits)}`."
        )
    shots = config.get("fewshot_split")
    if shots is not None and shots not in splits:
        if not config.get("num_fewshot"):
            config["fewshot_split"] = None
        else:
            raise ConfigError(
                f"The task `{name}` draws `{config['num_fewshot']}` examples from the split "
                f"`{shots}`, which its data has not; it has `{', '.join(splits)}`.",
                hint="give a mirror of the whole data set",
            )
    for split in ("training_split", "validation_split"):
        if config.get(split) not in splits:
            config[split] = None


def _missing(name: str, path: str, config: str | None, sources: Sequence[Path]) -> ConfigError:
    where = ", ".join(f"`{source}`" for source in sources) or "no directory (none was given)"
    layout = f"{path}/{config}" if config else path
    return ConfigError(
        f"The task `{name}` needs the data set `{path}`, which was looked for in {where}.",
        hint=f"put a mirror into `DIR/{layout}` (save_to_disk, or one parquet or jsonl file for "
        "each split)",
    )


def _cannot_build(names: Sequence[str], error: Exception, online: bool) -> ConfigError:
    text = str(error).strip().splitlines()
    reason = text[0][:300].rstrip(".") if text else type(error).__name__
    return ConfigError(
        f"lm-eval cannot build `{', '.join(names)}`: {type(error).__name__}: {reason}.",
        hint=None
        if online
        else "a task that fetches its own data cannot, since nothing is fetched",
    )


def _index_for(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """lm-eval's index of tasks: of the folders that the names need, or of all."""
    words = [name.split("_")[0] for name in names]
    index: dict[str, Any] = {}
    if include_path is None and all(word in FOLDERS for word in words):
        folders = sorted({folder for word in words for folder in FOLDERS[word]})
        index = _index(tuple(folders))
        if all(name in index or name in DERIVED for name in names):
            return dict(index)
    index = dict(_index(("",)))
    if include_path is not None:
        from lm_eval.tasks._index import TaskIndex

        if not include_path.is_dir():
            raise ConfigError(f"`{include_path}` is no folder with task files.")
        index |= TaskIndex().build([include_path])
    return index


@cache
def _index(folders: tuple[str, ...]) -> dict[str, Any]:
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    root = Path(lm_eval.tasks.__file__).parent
    return dict(TaskIndex().build([root / folder for folder in folders]))


def _manager(index: dict[str, Any], binder: _Binder) -> Any:
    """lm-eval's TaskManager over an index, whose factory asks `binder` for each task's data."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._factory import TaskFactory
    from lm_eval.tasks._index import Kind

    class Factory(TaskFactory):  # type: ignore[misc]  # lm_eval has no types
        def _load_full_config(self, entry: Any, overrides: Any = None) -> dict[str, Any]:
            binder.check(entry)
            return binder.bind(super()._load_full_config(entry, overrides))

        def build(self, entry: Any, *, overrides: Any = None, registry: Any) -> Any:
            # A group that changes settings of a group or tag within it (`openllm`: 5 shots for
            # `mmlu`) would also give the name of that to each of its tasks: 57 become 1.
            named = registry.get((overrides or {}).get("task"))
            if named is not None and named.kind in (Kind.GROUP, Kind.TAG):
                overrides = {**overrides, "task": entry.name}
                if entry.kind is Kind.GROUP:
                    del overrides["task"]
            return super().build(entry, overrides=overrides, registry=registry)

    manager = TaskManager(include_defaults=False)
    manager._index = index
    manager._factory = Factory(meta={})
    return manager

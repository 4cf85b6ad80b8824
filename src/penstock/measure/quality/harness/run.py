"""Runs lm-evaluation-harness and writes a row for each document.

Owns the order of things: seeds, tasks, checks that fail before anything is asked, evaluation,
rows, marks. lm-eval's own printed results go into the mark `harness`; figures are made of the
rows. Uses lm-eval's `evaluate` and not `simple_evaluate`, which starts subprocesses to describe the
machine and imports torch; the settings that `simple_evaluate` makes are made here in the same way.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import msgspec

from penstock.errors import ConfigError, EngineError, PenstockError
from penstock.measure.quality.harness import tasks as harness_tasks
from penstock.measure.quality.harness.access import Access
from penstock.measure.quality.harness.datasets import sources_or_default
from penstock.measure.quality.harness.rows import NOT_FINITE, How, Metric, metric_of, rows_of
from penstock.measure.quality.harness.surroundings import NUMPY_SEED, SEED, quiet, seeded
from penstock.measure.quality.tasks import ScoreFacts, TaskFacts
from penstock.measure.records import Clock, Record, Request

FEWSHOT_SEED = 1234  # lm-eval's default, which published scores have
# What the boards and papers report of a task that has several scores.
MAIN = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "truthfulqa_mc2": "acc"}


class Sink(Protocol):
    """What records are given to: `penstock.measure.run.Writer`, or a list in a test."""

    clock: Clock

    def add(self, record: Record) -> None: ...

    def mark(self, name: str, *, arm: str = "", stage: str = "", **facts: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be evaluated, loaded and checked. `prepare` makes it."""

    names: tuple[str, ...]
    found: harness_tasks.LoadedTasks
    limit: int | float | None
    samples: Mapping[str, Sequence[int]] | None
    num_fewshot: int | None
    gen_kwargs: Mapping[str, Any]
    chat: bool
    system: str | None
    fewshot_seed: int

    @property
    def tasks(self) -> dict[str, Any]:
        """lm-eval's task objects by name."""
        return dict(self.found.loaded["tasks"])

    @cached_property
    def metrics(self) -> dict[str, dict[str, Metric]]:
        """By task and `metric,filter`."""
        return {name: _metrics_of(task) for name, task in self.tasks.items()}

    def settings(self) -> dict[str, Any]:
        """What the run's header must say for the scores to be computed and repeated."""
        from importlib.metadata import version

        return {
            "names": list(self.names),
            "lm_eval_version": version("lm_eval"),
            "limit": self.limit,
            "samples": None if self.samples is None else dict(self.samples),
            "num_fewshot": self.num_fewshot,
            "gen_kwargs": dict(self.gen_kwargs),
            "chat": self.chat,
            "system": self.system,
            "seeds": {
                "random": SEED,
                "numpy": NUMPY_SEED,
                "fewshot": self.fewshot_seed,
            },
            "tasks": {
                name: {
                    "version": task.VERSION,
                    "num_fewshot": task.config.num_fewshot,
                    "output_type": task.OUTPUT_TYPE,
                    "data": self.found.data_sources.get(name, "hub"),
                    "note": self.found.notes.get(name, ""),
                    "metrics": msgspec.to_builtins(self.metrics[name]),
                }
                for name, task in self.tasks.items()
            },
        }

    def facts(self) -> dict[str, TaskFacts]:
        """By task, for the header of an evaluation."""
        return {name: self._facts(name, task) for name, task in self.tasks.items()}

    def docs(self, name: str) -> list[tuple[int, Any]]:
        """The documents of a task that will be asked, with their numbers."""
        from lm_eval.evaluator_utils import get_sample_size

        task = self.tasks[name]
        samples = None if self.samples is None else self.samples.get(name)
        if samples is not None:
            return list(task.doc_iterator(samples=list(samples)))
        return list(task.doc_iterator(limit=get_sample_size(task, self.limit)))

    def _facts(self, name: str, task: Any) -> TaskFacts:
        docs = [doc for _, doc in self.docs(name)]
        digest = hashlib.sha256()
        for doc in docs:
            digest.update(json.dumps(doc, default=str, sort_keys=True).encode() + b"\n")
        metrics = self.metrics[name]
        wanted = MAIN.get(name)
        main = next((full for full in metrics if full.split(",")[0] == wanted), next(iter(metrics)))
        note = self.found.notes.get(name, "")
        source = self.found.data_sources.get(name, f"hub: {task.config.dataset_path}")
        return TaskFacts(
            name=name,
            main_score=metrics[main].score,
            scores={
                metric.score: ScoreFacts(
                    weight=metric.weight, higher_is_better=metric.higher_is_better
                )
                for metric in metrics.values()
            },
            random_baseline=_baseline(task, docs, main),
            data_hash=digest.hexdigest(),
            data_source=f"{source} ({note})" if note else source,
            num_items=len(docs),
        )


def prepare(
    names: Sequence[str],
    *,
    limit: int | float | None = None,
    samples: Mapping[str, Sequence[int]] | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    chat: bool = False,
    system: str | None = None,
    fewshot_seed: int = FEWSHOT_SEED,
    sources: Sequence[Path] | None = None,
    include_path: Path | None = None,
    online: bool = False,
) -> Plan:
    """Load tasks and their data; nothing is asked yet.

    Args:
        names: of tasks, groups or tags of lm-eval, or of `tasks.DERIVED`.
        limit: only the first so many documents of each task (below 1: that share).
        samples: only these documents, by task; not with `limit`.
        num_fewshot: examples in a prompt, where the task does not fix 0; default: the task's.
        gen_kwargs: over the `generation_kwargs` of generative tasks.
        chat: put prompts into the model's chat template, examples as turns.
        system: a system message.
        sources: directories with data; default: the one that PENSTOCK_DATA names.
        include_path: a folder with task files of one's own.
        online: fetch missing data from the hub.

    Raises:
        ConfigError: a name, a data set or a setting is wrong or missing.
    """
    if limit is not None and samples is not None:
        raise ConfigError("`limit` and `samples` both choose documents.", hint="set one of them")
    directories = sources_or_default(sources)
    with seeded(), quiet():
        found = harness_tasks.load(names, directories, include_path=include_path, online=online)
    for task in found.loaded["tasks"].values():
        _configure(task, num_fewshot, gen_kwargs)
    return Plan(
        names=tuple(names),
        found=found,
        limit=limit,
        samples=samples,
        num_fewshot=num_fewshot,
        gen_kwargs=dict(gen_kwargs or {}),
        chat=chat,
        system=system,
        fewshot_seed=fewshot_seed,
    )


def run_harness(
    access: Access,
    plan: Plan,
    *,
    writer: Sink,
    arm: str = "",
    block: int = 0,
    keep_questions: bool = True,
) -> list[Request]:
    """Evaluate a plan and write its rows and marks. It blocks, also where an event loop runs.

    Call it in the main thread: some tasks (MATH) grade with signals, which work nowhere else.

    Args:
        keep_questions: a row's `details["question"]` has its prompt, shortened.

    Raises:
        ConfigError: the model cannot do what a task asks; nothing was asked yet.
        EngineError: the model or its server failed. lm-eval scores at the end, so that there are
            no rows then.
    """
    stops = _check(access, plan)
    if any(task.OUTPUT_TYPE != "generate_until" for task in plan.tasks.values()):
        access.check()
    started_s = time.monotonic()
    with seeded(), quiet():
        results = _evaluate(access, plan)
    duration_s = time.monotonic() - started_s
    rows: list[Request] = []
    for name, samples in results.pop("samples").items():
        for row in rows_of(name, samples, plan.metrics[name]):
            row.arm, row.block, row.model = arm, block, access.name
            row.index = len(rows)
            row.t_done_ns = writer.clock.now_ns()
            if not keep_questions:
                del row.details["question"]
            if NOT_FINITE in row.details:
                access.troubles.add(f"A document of `{name}` has a score that is no finite number")
            rows.append(row)
            writer.add(row)
    for message in [*stops, *access.troubles.drain()]:
        writer.mark("problem", arm=arm, message=f"lm-eval: {message}")
    writer.mark("harness", arm=arm, **_summary(access, results, duration_s))
    return rows


def _configure(task: Any, num_fewshot: int | None, gen_kwargs: Mapping[str, Any] | None) -> None:
    """What lm-eval's `simple_evaluate` sets on a task before it evaluates."""
    if gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
    default = task.get_config("num_fewshot")
    if num_fewshot is not None and default != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)


def _check(access: Access, plan: Plan) -> list[str]:
    """Fail before anything is asked; what else a reader must know."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if access.facts.get("access") == "chat" and not plan.chat:
        raise ConfigError(
            "The chat route takes conversations, but the plan has no chat template.",
            hint="prepare it with `chat`",
        )
    problems = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    for name, task in plan.tasks.items():
        if not in_main_thread and _uses_signals(task):
            raise ConfigError(
                f"The task `{name}` grades with signals, which works in the main thread only."
            )
        if task.OUTPUT_TYPE != "generate_until":
            if not access.has_loglikelihood:
                raise ConfigError(
                    f"The task `{name}` scores given texts, which the chat route cannot.",
                    hint="use the route /v1/completions, or a generative task",
                )
            continue
        kwargs = normalize_gen_kwargs(dict(task.config.generation_kwargs or {}))
        if kwargs["max_gen_toks"] >= access.context_len - 1:
            from penstock.measure.quality.harness.model import too_long_answers

            raise too_long_answers(kwargs["max_gen_toks"], access.context_len)
        if access.same_seed and (task.config.repeats or 1) > 1:
            problems.append(
                f"Each of the `{task.config.repeats}` repeats of `{name}` is sent with the same "
                "seed."
            )
        num_stops = len(kwargs["until"])
        if access.max_stops is not None and num_stops > access.max_stops:
            problems.append(
                f"Of the `{num_stops}` stop strings of `{name}` only `{access.max_stops}` are sent."
            )
    return problems


def _uses_signals(task: Any) -> bool:
    """Whether its own grading sets an alarm; in another thread it would fail after all answers."""
    names = getattr(task.config.process_results, "__globals__", {})
    modules = (getattr(value, "__module__", None) or "" for value in names.values())
    return "signal" in names or any(module.startswith("math_verify") for module in modules)


def _evaluate(access: Access, plan: Plan) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    for task in plan.tasks.values():  # else a plan's second run would draw other examples
        task.set_fewshot_seed(seed=plan.fewshot_seed)
    try:
        results = evaluate(
            access.lm,
            plan.found.loaded,
            limit=plan.limit,
            samples=None
            if plan.samples is None
            else {name: list(ids) for name, ids in plan.samples.items()},
            bootstrap_iters=0,
            log_samples=True,
            system_instruction=plan.system,
            apply_chat_template=plan.chat,
            fewshot_as_multiturn=plan.chat,
        )
    except PenstockError:
        raise
    except Exception as error:  # of lm-eval, its client, or a task's own code
        text = str(error).strip().splitlines()
        reason = text[0][:300].rstrip(".") if text else "no reason given"
        raise EngineError(
            f"lm-eval stopped on `{access.name}`: {type(error).__name__}: {reason}.",
            hint="one request that fails for good ends the whole evaluation",
        ) from error
    assert results is not None  # only on other ranks of a distributed run
    return dict(results)


def _summary(access: Access, results: Mapping[str, Any], duration_s: float) -> dict[str, Any]:
    """lm-eval's results as it prints them, and what they were made with."""
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples")
    summary = {key: results[key] for key in kept if key in results}
    summary |= {"access": access.facts, "model": access.name, "duration_s": round(duration_s, 3)}
    plain: dict[str, Any] = json.loads(json.dumps(summary, default=str))
    return plain


def _metrics_of(task: Any) -> dict[str, Metric]:
    higher = task.higher_is_better()
    filters = [filter_.name for filter_ in getattr(task, "_filters", ())] or ["none"]
    return {
        f"{name},{filter_name}": metric_of(
            name, filter_name, _how(function), bool(higher.get(name, True))
        )
        for filter_name in filters
        for name, function in task.aggregation().items()
    }


def _how(function: Any) -> How:
    """Which of the aggregations that we know a function of lm-eval is."""
    from lm_eval.api import metrics

    known: dict[Any, How] = {
        metrics.mean: "mean",
        metrics.perplexity: "perplexity",
        metrics.weighted_perplexity: "weighted_perplexity",
        metrics.bits_per_byte: "bits_per_byte",
    }
    if getattr(function, "__name__", "") == "agg_inst_level_acc":  # of the two IFEval tasks
        return "flat_mean"
    return known.get(function, "other")


def _baseline(task: Any, docs: Sequence[Any], main: str) -> float | None:
    """What chance gets of an accuracy: the mean of 1 / number of choices."""
    if task.OUTPUT_TYPE == "generate_until":
        return 0.0
    if task.OUTPUT_TYPE != "multiple_choice" or not main.startswith("acc") or not docs:
        return None
    return sum(1 / len(task.doc_to_choice(doc)) for doc in docs) / len(docs)

"""A process that loads one model in two precisions and compares their logits, token by token.

Reads a job from stdin, writes a line of JSON for each text to stdout, and keeps no logits. It
drives the engine's runner itself: one row, its own blocks, prompt logits as the engine computes
them for `prompt_logprobs`, so that kernels, KV cache and formats are those that serve.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.engine.build import make_runner
from penstock.engine.locate import locate
from penstock.engine.plan import Admission, Slice, StepPlan
from penstock.engine.runner import Runner
from penstock.errors import ConfigError, PenstockError
from penstock.measure.offline import config_of
from penstock.measure.verdict.divergence import window_facts
from penstock.models.files import read_config
from penstock.models.load import Backends
from penstock.models.spec import ModelSpec
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer, load_tokenizer
from penstock.types import SamplingParams

MOST_TOKENS = 1_024  # of a text: three float32 [T, vocabulary] are held


class _Tap:
    """A model that keeps a copy of the logits that it is asked for."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.seen: list[NDArray[np.float32]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, rows: Any) -> Any:
        made = self._model.logits(rows)
        # On a GPU it is a tensor, whose type numpy may not have.
        host = made if isinstance(made, np.ndarray) else made.float().cpu().numpy()
        self.seen.append(np.array(host, np.float32))
        return made


class Logits:
    """One model in one precision, for one text at a time."""

    def __init__(self, model: str, options: dict[str, str | None]) -> None:
        """Load it.

        Raises:
            ConfigError, ModelLoadError: as the engine does.
        """
        config = locate(config_of(model, {**options, "max_num_seqs": "1"}))
        path = config.path
        spec = ModelSpec.from_hf(read_config(path))
        config = config.resolve(
            max_context_len=spec.max_context_len,
            checkpoint_dtype=spec.dtype,
            backends=Backends(spec, config.tensor_parallel_size),
        )
        if config.tensor_parallel_size != 1:
            raise ConfigError("`tensor_parallel_size` must be 1 to compare logits.")
        self.max_tokens = min(config.context_len, MOST_TOKENS)
        self._step = config.max_num_batched_tokens
        self._blocks = list(range(-(-self.max_tokens // config.block_size)))
        self._runner: Runner = make_runner(path, config, len(self._blocks) + 1, (), None, {})
        runner = cast(Any, self._runner)  # both runners have a model
        self._tap = runner.model = _Tap(runner.model)

    def __call__(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Logits [T - 1, V] after each token but the last."""
        num_tokens = len(token_ids)
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        admitted = [Admission(0, token_ids, num_tokens, params, 0)]
        blocks = [(0, self._blocks)]
        self._tap.seen.clear()
        for start in range(0, num_tokens, self._step):
            length = min(self._step, num_tokens - start)
            plan = StepPlan([Slice(0, start, length)], admitted, [], blocks)
            self._runner.launch(plan).read()
            admitted, blocks = [], []
        self._runner.launch(StepPlan([], [], [0], [])).read()
        seen = np.concatenate(self._tap.seen)
        assert len(seen) == num_tokens  # the last is that of the token that was sampled
        return seen[:-1]


def windows(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Facts of each text; of a conversation only the answer's tokens are compared."""
    tokenizer = load_tokenizer(locate(config_of(job["model"], job["options"][0])).path)
    template = ChatTemplate.for_tokenizer(tokenizer)
    base, variant = (Logits(job["model"], options) for options in job["options"])
    num_done = 0
    for text in job["texts"]:
        if num_done >= job["num_tokens"]:
            return
        prompt = _prompt_ids(text, tokenizer, template)
        token_ids = prompt + tokenizer.encode(text["answer"], add_special_tokens=False)
        token_ids = token_ids[: min(base.max_tokens, variant.max_tokens)]
        if len(token_ids) <= max(len(prompt), 1):
            continue
        first = max(len(prompt) - 1, 0)  # what it says of the answer's first token
        one, two = base(token_ids)[first:], variant(token_ids)[first:]
        yield window_facts(one, two, np.array(token_ids[first + 1 :]))
        num_done += len(one)


def _prompt_ids(
    text: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[int]:
    if isinstance(text["prompt"], str):
        return tokenizer.encode(text["prompt"])
    if text["prompt"] is not None:
        return list(text["prompt"])
    if template is None:
        raise ConfigError("The model has no chat template.")
    return template.encode(tokenizer, text["messages"], add_generation_prompt=True)


def main() -> int:
    """Do the job on stdin."""
    job = msgspec.json.decode(sys.stdin.buffer.read())
    try:
        for facts in windows(job):
            sys.stdout.buffer.write(msgspec.json.encode(facts) + b"\n")
            sys.stdout.buffer.flush()
    except PenstockError as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - whoever started this reads it
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A tiny random Llama checkpoint, and the oracle: the same model without cache, batch or engine.

The oracle computes in float64 straight from the weights. The engine computes in float32, and
different matmul shapes differ in their last bits, so a token may legitimately differ where two
candidates are closer than `EPSILON`. Only there a mismatch is forgiven, and it is counted.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from penstock.attention.kv_store import KVStore
from penstock.attention.pages import SCALED
from penstock.attention.reference import ReferenceAttention
from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.engine.memory import PROMPT_LOGPROB_ROWS
from penstock.engine.plan import Admission, StepPlan
from penstock.engine.runner import HostRunner, Runner, Step
from penstock.engine.state import DeviceState
from penstock.models.base import Model
from penstock.models.blocks import Decoder
from penstock.models.load import load_model
from penstock.models.native_model import NativeModel
from penstock.models.torch_model import TorchModel
from penstock.sampling import host as sampler
from penstock.types import (
    EngineInfo,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
    Usage,
)

EPSILON = 1e-3  # of a logit; the logits' own spread is about 5
EOS = 60
POISON = 1e4

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}
VOCAB = 61

Weights = dict[str, torch.Tensor]


def random_weights(seed: int = 0) -> Weights:
    """Weights so large that logits are spread and every layer and position matters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    hidden, middle = 32, 48
    weights = {
        "model.embed_tokens.weight": draw(VOCAB, hidden, std=1.0),
        "model.norm.weight": 1 + draw(hidden, std=0.1),
        "lm_head.weight": draw(VOCAB, hidden, std=0.9),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": 1 + draw(hidden, std=0.1),
            prefix + "post_attention_layernorm.weight": 1 + draw(hidden, std=0.1),
            prefix + "self_attn.q_proj.weight": draw(32, hidden, std=0.3),
            prefix + "self_attn.k_proj.weight": draw(16, hidden, std=0.3),
            prefix + "self_attn.v_proj.weight": draw(16, hidden, std=0.3),
            prefix + "self_attn.o_proj.weight": draw(hidden, 32, std=0.3),
            prefix + "mlp.gate_proj.weight": draw(middle, hidden, std=0.2),
            prefix + "mlp.up_proj.weight": draw(middle, hidden, std=0.2),
            prefix + "mlp.down_proj.weight": draw(hidden, middle, std=0.2),
        }
    return weights


def write_checkpoint(directory: Path, weights: Weights) -> Path:
    """A Hugging Face directory that the real loader reads."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """RoPE of [T, heads, 8], the halves turned against each other; position = index."""
    cos, sin = COS[: len(x)], SIN[: len(x)]
    low, high = x[..., :4], x[..., 4:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


ANGLE = torch.arange(64)[:, None, None] * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
COS, SIN = ANGLE.cos(), ANGLE.sin()


class NaiveLlama:
    """The whole sequence, every time, in float64."""

    def __init__(self, weights: Weights) -> None:
        self.weights = {name: weight.double() for name, weight in weights.items()}

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[T, V] float64."""
        w = self.weights
        num = len(token_ids)
        mask = torch.full((num, num), -torch.inf, dtype=torch.float64).triu(1)
        x = w["model.embed_tokens.weight"][torch.tensor(token_ids)]
        for layer in range(2):
            p = f"model.layers.{layer}."
            h = norm(x, w[p + "input_layernorm.weight"])
            q = rotate((h @ w[p + "self_attn.q_proj.weight"].T).view(num, 4, 8))
            k = rotate((h @ w[p + "self_attn.k_proj.weight"].T).view(num, 2, 8))
            v = (h @ w[p + "self_attn.v_proj.weight"].T).view(num, 2, 8)
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5 + mask
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(num, 32)
            x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
            h = norm(x, w[p + "post_attention_layernorm.weight"])
            gate = torch.nn.functional.silu(h @ w[p + "mlp.gate_proj.weight"].T)
            x = x + (gate * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
        return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


class TinyModel:
    """The checkpoint as our loader reads it, on one backend."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        """`options` are those of `load_model`; with backend "triton" those of `_device_runner`."""
        self._checkpoint = checkpoint
        self._options = {"backend": "torch", "dtype": "float32", "num_threads": 1} | options
        self._decoder: Decoder | None = None

    def core(
        self, *, max_model_len: int = 64, num_blocks: int | None = None, **settings: Any
    ) -> EngineCore:
        """An engine with a fresh cache; by default its pool holds four full requests."""
        config = EngineConfig(model="tiny", **settings)
        block_size, max_num_seqs = config.block_size, config.max_num_seqs
        if num_blocks is None:
            num_blocks = 4 * -(-max_model_len // block_size)
        state = DeviceState(max_num_seqs, max_model_len, block_size)
        info = EngineInfo(
            model="tiny",
            max_model_len=max_model_len,
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            dtype="float32",
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
        )
        if self._options["backend"] == "triton":
            runner: Runner = self._device_runner(num_blocks, state)
        else:
            runner = HostRunner(self._model(num_blocks * block_size), state, (EOS,))
        return EngineCore(config, info, runner)

    def _device_runner(self, num_blocks: int, state: DeviceState) -> Runner:
        """The checkpoint on the GPU, or without one on the CPU; its pages are poisoned, too.

        Options: `depth` 0 or 1, `enforce_eager`, and what else `device_model.load` takes.
        """
        from penstock.engine.device_runner import DeviceRunner
        from penstock.kernels.gpu import device
        from penstock.models import device_model
        from penstock.parallel.group import Alone

        options = {
            "quantization": "none",
            "kv_cache_dtype": "float32",
            "attention_backend": "triton",
            "depth": 1,
            "enforce_eager": False,
        } | self._options
        for name in ("backend", "num_threads"):
            del options[name]
        depth, enforce_eager = options.pop("depth"), options.pop("enforce_eager")
        model = device_model.load(
            self._checkpoint,
            num_blocks=num_blocks,
            block_size=state.block_size,
            group=Alone(),
            device=device(),
            load_format="auto",
            seed=0,
            phases={},
            **options,
        )
        model.kv.data.copy_(torch.full((), 100 if model.kv.dtype in SCALED else POISON))
        if model.kv.scales is not None:
            model.kv.scales.fill_(POISON / 100)
        return DeviceRunner(model, state, (EOS,), depth=depth, enforce_eager=enforce_eager)

    def _model(self, num_slots: int) -> Model:
        """A model whose KV store is full of what shows if it is read without being written."""
        if self._decoder is not None:  # of torch: its leaves know no KV store
            kv = KVStore(2, num_slots, 4, 8, torch.float32)
            kv.data.fill_(POISON)
            return TorchModel(self._decoder, kv, ReferenceAttention())
        model = load_model(
            self._checkpoint,
            num_slots=num_slots,
            max_num_tokens=2048,
            max_num_logit_rows=PROMPT_LOGPROB_ROWS,
            **self._options,
        )
        if isinstance(model, TorchModel):
            self._decoder = model.decoder
            return self._model(num_slots)
        assert isinstance(model, NativeModel)
        kv = model._materials.kv
        kinds = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}
        memory = kv.data.view(kinds[kv.dtype])
        memory[:] = {"float32": POISON, "bfloat16": 0x461C, "int8": 100}[kv.dtype]
        kv.scales.view(np.float32)[:] = POISON / 100
        return model


@dataclass
class Output:
    """The events of one request, put together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish: FinishReason | None = None
    usage: Usage | None = None

    def push(self, event: TokenEvent) -> None:
        assert self.finish is None, "an event after the last one"
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or []
        if event.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "prompt logprobs come once"
            self.prompt_logprobs = event.prompt_logprobs
        self.finish, self.usage = event.finish, event.usage
        assert event.usage.num_generated_tokens == len(self.token_ids)


class Cut(BaseException):
    """What Ctrl-C raises, but not to be mistaken for it."""


def cut_at(core: EngineCore, points: Collection[int]) -> None:
    """Have steps of `core` raise `Cut` at these points, counted over all its steps.

    Points lie before and behind: taking over the plan, the model, its logits, noting the sampled
    tokens; on torch also planning the attention, and the attention of each layer (before which this
    layer's KV is not written); on a device also the attention of each layer, what is written into
    the tables, graphs, and reading.
    """
    numbers = itertools.count()

    def pass_point() -> None:
        if next(numbers) in points:
            raise Cut

    def guard(owner: object, name: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any) -> Any:
            pass_point()
            result = inner(*args)
            pass_point()
            return result

        setattr(owner, name, call)

    runner: Any = core._runner
    guarded: list[tuple[object, str]] = [
        (runner._state, "apply"),
        (runner.model, "forward"),
        (runner.model, "logits"),
    ]
    if isinstance(runner, HostRunner):
        guarded.append((runner._state, "append"))
    else:  # of a device
        guarded += [(runner.tables, "write"), (runner._sampler, "sample")]
        guarded += [(runner._graphs, "replay")] if runner._graphs else []
        guarded.append((runner.model.attention, "forward"))
        launch = runner.launch

        def launch_and_guard(plan: StepPlan) -> Step:
            step = SimpleNamespace(read=launch(plan).read)
            guard(step, "read")
            return step

        runner.launch = launch_and_guard
    if isinstance(runner.model, TorchModel):
        guarded += [(runner.model._attention, "plan"), (runner.model._attention, "forward")]
    for owner, name in guarded:
        guard(owner, name)


def run(
    core: EngineCore,
    requests: list[EngineRequest],
    *,
    arrivals: Mapping[str, int] = MappingProxyType({}),
    aborts: Mapping[str, int] = MappingProxyType({}),
    cuts: Collection[int] = (),
    on_step: Callable[[EngineCore], None] = lambda core: None,
    on_cut: Callable[[], None] = lambda: None,
) -> dict[str, Output]:
    """Drive the engine to the end, checking its invariants before and after every step.

    Args:
        arrivals: the step before which a request is added; 0 if it is not named.
        aborts: the step before which a request is aborted, if it has arrived and lives.
        cuts: points at which a step is cut off (see `cut_at`); the engine goes on with the next.
        on_step: called after every step.
        on_cut: called after every step that was cut off.
    """
    outputs: dict[str, Output] = {}
    if cuts:
        cut_at(core, cuts)
    todo = sorted(requests, key=lambda request: arrivals.get(request.request_id, 0))
    step = 0
    while todo or core.has_work:
        while todo and arrivals.get(todo[0].request_id, 0) <= step:
            outputs[todo[0].request_id] = Output()
            core.add(todo.pop(0))
        events = [
            event
            for request_id, at in aborts.items()
            if at == step and request_id in outputs
            for event in core.abort(request_id)
        ]
        core.scheduler.check()
        try:
            events += core.step()
        except Cut:
            on_cut()
        for event in events:
            outputs[event.request_id].push(event)
        core.scheduler.check()
        on_step(core)
        step += 1
        assert step < 10_000, "the engine makes no progress"
    assert core.stats.num_used_blocks == 0
    return outputs


class Answer(NamedTuple):
    token_ids: list[int]
    finish: FinishReason
    num_forgiven: int  # tokens that followed the engine because of a near tie


class Oracle:
    """A loop: all tokens through the naive model, sample one, append."""

    def __init__(self, weights: Weights) -> None:
        self.model = NaiveLlama(weights)

    def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        max_model_len: int,
        engine: list[int] | None = None,
        max_tokens: int | None = None,
    ) -> Answer:
        """What the engine must answer.

        Args:
            engine: what it did answer. Saves recomputing the model for every token as long as it
                is right, and is followed where two tokens nearly tie.
            max_tokens: stop there as if by length; for the beginning of an answer.
        """
        expected = prompt + (engine or [])
        expected_logits = self.model.logits(expected).float()
        token_ids, num_forgiven = list(prompt), 0
        while True:
            num = len(token_ids)
            if token_ids == expected[:num]:
                logits = expected_logits[num - 1]
            else:
                logits = self.model.logits(token_ids)[-1].float()
            token_id = sample_alone(logits, token_ids, len(prompt), params, seed)
            if token_ids == expected[:num] and expected[num : num + 1] not in ([], [token_id]):
                wanted = expected[num]
                if self._is_near_tie(logits, token_ids, len(prompt), params, seed, wanted):
                    token_id, num_forgiven = wanted, num_forgiven + 1
            token_ids.append(token_id)
            answer = token_ids[len(prompt) :]
            if len(answer) > params.min_tokens and (
                token_id in params.stop_token_ids or (token_id == EOS and not params.ignore_eos)
            ):
                return Answer(answer, FinishReason.STOP, num_forgiven)
            if len(answer) in (params.max_tokens, max_tokens) or len(token_ids) == max_model_len:
                return Answer(answer, FinishReason.LENGTH, num_forgiven)

    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """[T, V]: row t is the distribution of token t + 1."""
        return self.model.logits(token_ids).log_softmax(-1)

    def _is_near_tie(
        self,
        logits: torch.Tensor,
        token_ids: list[int],
        num_prompt: int,
        params: SamplingParams,
        seed: int,
        wanted: int,
    ) -> bool:
        """Whether noise of `EPSILON` on the logits makes `wanted` the sampled token."""
        generator = torch.Generator().manual_seed(0)
        return any(
            sample_alone(
                logits + EPSILON * (torch.rand(VOCAB, generator=generator) - 0.5),
                token_ids,
                num_prompt,
                params,
                seed,
            )
            == wanted
            for _ in range(32)
        )


def sample_alone(
    logits: torch.Tensor, token_ids: list[int], num_prompt: int, params: SamplingParams, seed: int
) -> int:
    """One token by the real sampler (which has an oracle of its own), alone in a fresh state."""
    state = DeviceState(1, len(token_ids) + 1, 1)
    state.apply(StepPlan([], [Admission(0, token_ids, num_prompt, params, seed)], [], []))
    sampled = sampler.sample(logits[None].numpy(), np.zeros(1, np.int64), state, (EOS,))
    return int(sampled.token_ids[0])

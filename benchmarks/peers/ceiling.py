"""The measured ceiling of each figure: what it would be if nothing but the hardware took time.

Owns the roofline arithmetic and the call of `ceiling.c`, which measures this machine. A step takes
as long as its bytes from DRAM or its operations, whichever is more; weights are read once a step,
keys and values in 16 bits once for every request, and activations are free.
Knows neither engines nor their overheads. A figure without a ceiling (memory, start-up) has none.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.cells import NUM_SHARING, OWN_LEN, SHARED_LEN
from benchmarks.peers.shapes import Shape

# int4: the smallest of the formats compared, 4 bits a weight and 4 for the scale of every 32
# (llama.cpp's Q4_0 takes 4.5).
WEIGHT_BITS = {"bf16": 16.0, "int8": 8.0, "int4": 4.125}


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates that were measured, in 1e9 a second."""

    read_gb_s: float
    bf16_gflops: float  # the best of what computes with bfloat16 or more
    int8_gops: float  # the best of that and int8

    def seconds(self, num_bytes: float, linear: float, other: float, precision: str) -> float:
        """A step that reads `num_bytes` and does operations: of quantized weights, and others."""
        rate = self.bf16_gflops if precision == "bf16" else self.int8_gops
        compute_s = (linear / rate + other / self.bf16_gflops) * 1e-9
        return max(num_bytes * 1e-9 / self.read_gb_s, compute_s)


def measure(directory: Path, cores: Sequence[int]) -> dict[str, float]:
    """Compile `ceiling.c` for this machine and run it: its rates by name.

    Raises:
        OSError, subprocess.CalledProcessError: there is no C compiler, or it failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "ceiling"
    source = Path(__file__).with_name("ceiling.c")
    flags = ["-O3", "-march=native", "-pthread"]
    subprocess.run(["cc", *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run(
        [str(program), *map(str, cores)], check=True, capture_output=True, text=True
    )
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def machine(measurements: Sequence[dict[str, float]]) -> Machine:
    """The best of several measurements."""

    def best(*prefixes: str) -> float:
        return max(
            (
                rate
                for one in measurements
                for name, rate in one.items()
                if name.startswith(prefixes)
            ),
            default=0.0,
        )

    return Machine(
        read_gb_s=best("read"),
        bf16_gflops=best("fp32", "bf16"),
        int8_gops=best("fp32", "bf16", "int8"),
    )


def ceilings(
    shape: Shape, precision: str, at: Machine, batches: dict[str, tuple[int, int, int]]
) -> dict[str, float]:
    """The ceiling of every figure that has one, in the figure's unit.

    Args:
        batches: figure -> requests, tokens of a prompt, tokens of an answer.
    """
    bits = WEIGHT_BITS[precision]
    weight_bytes = (shape.linear_parameters + shape.head_parameters) * bits / 8

    def step_s(num_new: int, num_requests: int, context: float) -> float:
        """All requests compute `num_new` tokens each, after or within `context` tokens."""
        num_tokens = num_new * num_requests
        linear = 2.0 * (shape.linear_parameters * num_tokens + shape.head_parameters * num_requests)
        attention = shape.attention_flops(context) * num_tokens
        kv_bytes = shape.kv_bytes_per_token * context * num_requests
        return at.seconds(weight_bytes + kv_bytes, linear, attention, precision)

    def prefill_s(num_tokens: int) -> float:
        return step_s(num_tokens, 1, num_tokens / 2)  # a token attends to those before it

    found = {f"decode-{length}": 1 / step_s(1, 1, length) for length in (128, 1024, 4096)}
    found |= {f"prefill-{length}": length / prefill_s(length) for length in (1024, 2048)}
    found["shared-first"] = prefill_s(SHARED_LEN + OWN_LEN)
    found["shared-others"] = step_s(OWN_LEN, NUM_SHARING, SHARED_LEN)
    for name, (num_requests, prompt_len, output_len) in batches.items():
        decoding_s = step_s(1, num_requests, prompt_len + output_len / 2) * (output_len - 1)
        seconds = step_s(prompt_len, num_requests, prompt_len / 2) + decoding_s
        found[name] = num_requests * output_len / seconds
    return found

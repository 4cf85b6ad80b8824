"""What the threads of the library do when the system gives no more: in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from penstock.native import library

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason="no native library here"
)

PRELUDE = """
import ctypes, os, resource, signal
import numpy as np
from penstock.errors import EngineError
from penstock.models.batch import ForwardBatch
from penstock.native.library import load
from penstock.native.memory import Arena
from penstock.native.pool import Pool
from penstock.native.program import Program
from penstock.native.sampling import Sampler
from penstock.native.structs import LinearArgs, OpKind, SampleArgs
from penstock.native.weights import PackedWeight, Placement
from penstock.quantization.schemes import Format

library = load()


def allow(num_bytes):
    "So much more memory than now."
    lines = open("/proc/self/status").read().splitlines()
    size = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (size + num_bytes, size + num_bytes))


def told(call):
    "The message of the error that a call must raise."
    try:
        call()
    except EngineError as error:
        return error.message
    raise AssertionError("no error")


def choose(pool):
    logits = np.zeros((3, 100), np.float32)
    logits[:, 5] = 50
    ones = np.ones(3, np.float32)
    return Sampler(pool)(logits, ones, 0 * ones, ones, 0 * ones, 0.5 * ones).tolist()


def packed(pool):
    source = np.random.default_rng(0).standard_normal((512, 256)).astype(np.float32)
    weight = PackedWeight(pool, Format("int8"), 512, 256, Arena())
    weight.pack(source.view(np.uint8).reshape(-1), "float32", 512, Placement())
    return weight


def product(pool, weight):
    "A program that needs scratch memory of each thread; how to run it."
    program = Program(pool, 64, 1)
    x, y = program.value(256, "float32"), program.value(512, "float32")
    args = LinearArgs(weight=weight.struct, x_stride=256, y_stride=512, activation_bits=8)
    args.num_outputs, args.num_groups, args.y_scale = 512, 1, 1.0
    program.append(OpKind.LINEAR, args, x=x, y=y)
    part = program.end_part()
    program.finish()
    n = 4
    step = dict(
        input_ids=np.zeros(n, np.int64), positions=np.arange(n), slot_mapping=np.arange(n),
        query_start=np.array([0, n], np.int32), context_len=np.array([n], np.int32),
        block_table=np.zeros((1, 1), np.int32), block_size=64, logit_rows=np.arange(1),
        lengths=[n], context_lens=[n],
    )
    program.set_step(ForwardBatch(**step))
    program.view(x)[:] = 1
    def run():
        program.run(part)
        return program.view(y)[:n].copy()
    return run


"""


def output_of(script: str) -> str:
    """What a process printed that ran the script and ended well."""
    command = [sys.executable, "-c", PRELUDE + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.strip()


def test_threads_that_the_system_refuses_are_an_error() -> None:
    printed = output_of("""
allow(256 << 20)
print(told(lambda: Pool(library, 1000)))
print(choose(Pool(library, 2)))
""")
    message, tokens = printed.splitlines()
    assert "the system does not give 1000 threads" in message
    assert tokens == "[5, 5, 5]"


def test_memory_that_the_system_refuses_leaves_the_pool_as_it_was() -> None:
    printed = output_of("""
pool = Pool(library, 2)
weight = packed(pool)
run = product(pool, weight)
before = run()
allow(600 << 20)
args = SampleArgs(vocab_size=50_000_000)  # of no rows: only its memory, 400 MB for each thread
print(told(lambda: library.call("penstock_sample", pool.handle, ctypes.byref(args))))
assert (run() == before).all()
assert choose(pool) == [5, 5, 5]
""")
    assert printed == "`penstock_sample` failed: sample: no memory for its scratch."


def test_a_pool_does_not_follow_into_a_fork() -> None:
    """There, its threads do not exist: an error at once, and an exit that waits for nobody."""
    printed = output_of("""
pool = Pool(library, 2)
weight = packed(pool)
run = product(pool, weight)
before = run()
child = os.fork()
if child == 0:
    signal.alarm(20)
    for call in (run, lambda: choose(pool), lambda: packed(pool)):
        print(told(call))
    print(choose(Pool(library, 2)), flush=True)
    raise SystemExit
assert os.waitpid(child, 0)[1] == 0
assert (run() == before).all()
""")
    *messages, tokens = printed.splitlines()
    why = "failed: pool: made in another process; make it after the fork."
    assert messages == [f"`penstock_{name}` {why}" for name in ("run", "sample", "pack")]
    assert tokens == "[5, 5, 5]"

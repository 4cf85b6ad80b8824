"""Compiles every kernel for one compute capability, without a GPU, and prints what came out.

A program of its own, because Triton's interpreter, which the tests run with, replaces the compiler.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from penstock.kernels import registry
from penstock.kernels.op import Compilation

COUNTERS = {"counters_ptr", "counters"}  # parameters of kernels whose last program finishes


def compiled(entry: Compilation, capability: int) -> dict[str, Any]:
    """Label, shared memory and spilled bytes, whether warp groups multiply, what loads are wide."""
    names = entry.kernel.arg_names
    unknown = (entry.signature.keys() | entry.constexprs.keys()) - set(names)
    assert not unknown, f"{entry.label}: the kernel has no parameters {unknown}"
    types = {**dict.fromkeys(entry.constexprs, "constexpr"), **entry.signature}
    signature = {name: types[name].removesuffix(":16") for name in names}
    aligned = [(i,) for i, name in enumerate(names) if types[name].endswith(":16")]
    source = ASTSource(
        fn=entry.kernel,
        signature=signature,
        constexprs=entry.constexprs,
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    result = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": entry.num_warps, "num_stages": entry.num_stages},
    )
    log = assembler_log(result.asm["ptx"], capability)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.findall(r"Used (\d+) registers", log)
    assert spilled, f"{entry.label}: no report of the assembler: {log}"
    return {
        "label": entry.label,
        "shared": result.metadata.shared,
        "spilled": sum(map(int, spilled)),
        "registers": max(map(int, registers)),
        "loads_16_bytes": bool(re.search(r"ld\.global\S*\.v4\.b32", result.asm["ptx"])),
        "is_fenced": is_fenced(result.asm["ptx"]) if COUNTERS & set(names) else True,
        "wgmma": "wgmma.mma_async" in result.asm["ptx"],
        "wants_wgmma": entry.wgmma,
    }


def is_fenced(ptx: str) -> bool:
    """Whether what programs leave for the last of them is written before, and read after.

    A barrier lets all threads finish their stores; the atomic releases them and acquires those of
    the other programs; what is read then comes past the cache of the multiprocessor.
    """
    counted = re.search(r"\batom\S*\.acq_rel\b", ptx)
    if counted is None:  # the largest tiles share nothing
        return "atom" not in ptx
    before, after = ptx[: counted.start()], ptx[counted.end() :]
    last_store = before.rfind("st.global")
    return "bar.sync" in before[last_store:] and "bar.sync" in after and "ld.global.cg" in after


def assembler_log(code: str, capability: int) -> str:
    """What the assembler says of registers; kept beside Triton's cache, which does not hold it."""
    arch = f"--gpu-name={sm_arch_from_capability(capability)}"
    path = Path(os.environ["TRITON_CACHE_DIR"], sha256((arch + code).encode()).hexdigest())
    log = path.with_suffix(".log")
    if not log.exists():
        path.write_text(code)
        command = [get_ptxas(capability).path, "-v", arch, str(path), "-o", os.devnull]
        log.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
    return log.read_text()


def main(capability: int) -> None:
    """A line of JSON for each compilation."""
    for entry in registry.compilations():
        if entry.lowest <= capability:
            try:
                print(json.dumps(compiled(entry, capability)), flush=True)
            except Exception as error:
                error.add_note(f"while compiling `{entry.label}` for `{capability}`")
                raise


if __name__ == "__main__":
    main(int(sys.argv[1]))

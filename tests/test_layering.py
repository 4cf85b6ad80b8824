"""Imports go down only (DESIGN 1), and what must work without torch imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "penstock"

TIERS = [
    {"errors", "types", "extras", "hardware"},
    {"native", "kernels", "parallel", "protocol", "text", "storage", "builtin", "gguf", "hub"},
    {"layers", "attention", "quantization", "sampling"},
    {"models"},
    {"speculative", "structured", "lora"},
    {"engine"},
    {"llm", "llm_pooling", "server", "gateway", "measure", "adapt", "explorer", "deploy"},
    {"cli"},
]
TIER = {name: number for number, names in enumerate(TIERS) for name in names}
# Arrows within a tier: (from, to). Everything else in one tier is a stranger.
SAME_TIER = {
    ("types", "errors"),
    ("extras", "errors"),
    ("text", "gguf"),
    ("hub", "builtin"),
    ("layers", "quantization"),
    ("layers", "attention"),
    ("adapt", "measure"),
    ("explorer", "measure"),
    ("llm", "llm_pooling"),
    ("measure", "llm"),
    ("deploy", "server"),
}
TORCH_FREE = [
    "penstock",
    "penstock.layers.toolkit",
    "penstock.models.base",
    "penstock.models.blocks",
    "penstock.models.architectures.llama",
    "penstock.models.checkpoint",
    "penstock.models.compose",
    "penstock.models.estimate",
    "penstock.models.shapes",
    "penstock.models.speeds",
    "penstock.native.rates",
    "penstock.models.gguf_model",
    "penstock.models.load",
    "penstock.models.loader",
    "penstock.models.registry",
    "penstock.models.spec",
    "penstock.types",
    "penstock.hub.download",
    "penstock.hub.inventory",
    "penstock.cli.models",
    "penstock.cli.plan",
    "penstock.protocol.openai",
    "penstock.text.gguf_tokenizer",
    "penstock.text.stream",
    "penstock.text.template",
    "penstock.engine.backends",
    "penstock.engine.build",
    "penstock.engine.client",
    "penstock.engine.memory",
    "penstock.engine.process",
    "penstock.engine.worker",
    "penstock.engine.ranks",
    "penstock.engine.rank_worker",
    "penstock.layers.shards",
    "penstock.models.device_footprint",
    "penstock.engine.config",
    "penstock.engine.scheduler",
    "penstock.engine.batch",
    "penstock.engine.runner",
    "penstock.models.gguf_model",
    "penstock.quantization.stored",
    "penstock.sampling.host",
    "penstock.engine.core",
    "penstock.server.app",
    "penstock.cli.main",
    "penstock.cli.bench",
    "penstock.cli.bench_engines",
    "penstock.cli.bench_load",
    "penstock.cli.compare",
    "penstock.cli.eval",
    "penstock.cli.results",
    "penstock.cli.track",
    "penstock.cli.verify",
    "penstock.measure.engines.session",
    "penstock.measure.kinds",
    "penstock.measure.load.session",
    "penstock.measure.quality.session",
]
# Who may name torch at all: the leaves that compute with it, attention, and the model around them;
# and whole packages that are nothing without it.
MADE_OF_TORCH = {"kernels", "parallel"}
USES_TORCH = {
    "attention/base.py",
    "attention/flashinfer.py",
    "attention/general.py",
    "attention/kv_store.py",
    "attention/paged.py",
    "attention/pages.py",
    "attention/reference.py",
    "cli/doctor.py",
    "engine/device_runner.py",
    "layers/device_attention.py",
    "layers/device_leaves.py",
    "layers/device_materials.py",
    "layers/device_norms.py",
    "layers/device_tables.py",
    "layers/device_toolkit.py",
    "layers/embedding.py",
    "layers/experts.py",
    "layers/linear.py",
    "layers/materials.py",
    "layers/norm.py",
    "layers/rotary.py",
    "layers/torch_attention.py",
    "layers/torch_toolkit.py",
    "models/device_model.py",
    "models/foreign.py",
    "models/graphs.py",
    "models/torch_model.py",
    "quantization/device.py",
    "quantization/encode.py",
    "sampling/device.py",
    "sampling/shaping.py",
}
# Measuring installs without an engine: who there touches one, and is imported only to do so.
MEASURES_IN_PROCESS = {
    "measure/offline.py",
    "measure/quality/harness/inprocess.py",
    "measure/quality/harness/model.py",
    "measure/verdict/divergence_worker.py",
}
ENGINE_PARTS = {
    "attention",
    "engine",
    "kernels",
    "layers",
    "llm",
    "llm_pooling",
    "models",
    "native",
    "parallel",
}


def modules_of(path: Path) -> set[str]:
    """The modules that a file imports, at any depth of nesting."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            if node.module == "penstock":
                found |= {f"penstock.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def imports_of(path: Path) -> set[str]:
    """The parts of penstock that a file imports."""
    return {name.split(".")[1] for name in modules_of(path) if name.startswith("penstock.")}


def part_of(path: Path) -> str:
    relative = path.relative_to(SRC)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


FILES = sorted(path for path in SRC.rglob("*.py") if path.parent != SRC or path.stem != "__init__")


def is_allowed(source: str, target: str) -> bool:
    if target not in TIER:  # a name of the package itself, such as __version__
        return target.startswith("__") or target in {"LLM", "SamplingParams"}
    if source == target:
        return True
    return TIER[target] < TIER[source] or (source, target) in SAME_TIER


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_down(path: Path) -> None:
    source = part_of(path)
    assert source in TIER, f"{source} has no tier: add it to DESIGN and to this table"
    upward = sorted(target for target in imports_of(path) if not is_allowed(source, target))
    assert not upward, f"{path.relative_to(SRC)} imports {upward}"


def test_the_rule_can_fail() -> None:
    assert not is_allowed("engine", "server")
    assert not is_allowed("server", "llm")
    assert is_allowed("server", "engine")


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_who_measures_in_process() -> None:
    found = {
        str(path.relative_to(SRC))
        for path in (SRC / "measure").rglob("*.py")
        if imports_of(path) & ENGINE_PARTS
    }
    assert found == MEASURES_IN_PROCESS


def test_measuring_needs_no_engine() -> None:
    """The commands of measuring, and what they import, load no part of the engine."""
    code = (
        "import sys\n"
        "from penstock.cli import bench, bench_engines, bench_load, compare, eval, track\n"
        "import penstock.measure.load.endpoint, penstock.measure.quality.runner\n"
        "import penstock.measure.verdict.figures, penstock.measure.track.service\n"
        f"parts = {sorted(ENGINE_PARTS)}\n"
        "found = [name for name in sys.modules if name.split('.')[:1] == ['penstock']\n"
        "         and name.split('.')[1:2] and name.split('.')[1] in parts]\n"
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_who_imports_torch() -> None:
    found = {
        str(path.relative_to(SRC))
        for path in SRC.rglob("*.py")
        if path.relative_to(SRC).parts[0] not in MADE_OF_TORCH
        and any(name.split(".")[0] == "torch" for name in modules_of(path))
    }
    assert found == USES_TORCH

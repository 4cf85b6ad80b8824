"""Writes a checkpoint as a Hugging Face directory: config, weights, tokenizer, template, log.

Run: python -m brook.export RUN_DIR TOKENIZER_DIR OUT_DIR
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .chat import BOS, END, EOS, PAD
from .data import special_id
from .model import Llama, ModelConfig, hf_config, hf_state

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LOG_LINES = 150


def copy_log(run: Path, out: Path) -> None:
    """The training log, thinned to at most LOG_LINES lines with the last one kept."""
    lines = (run / "log.jsonl").read_text().splitlines()
    step = -(-len(lines) // LOG_LINES)
    kept = lines[::-1][::step][::-1]
    (out / "training_log.jsonl").write_text("\n".join(kept) + "\n")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def export(run: Path, tokenizer_dir: Path, out: Path) -> None:
    """Everything but the model card."""
    out.mkdir(parents=True, exist_ok=True)
    saved = torch.load(run / "last.pt", weights_only=True)
    model = Llama(ModelConfig(**saved["model"]))
    model.load_state_dict(saved["weights"])
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    bos, end, eos, pad = (special_id(tokenizer, token) for token in (BOS, END, EOS, PAD))
    weights = out / "model.safetensors"
    save_file(hf_state(model), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # as created it is for the owner only
    write_json(out / "config.json", hf_config(model.config, {"bos": bos, "eos": end, "pad": pad}))
    generation = {
        "bos_token_id": bos,
        "eos_token_id": [end, eos],
        "pad_token_id": pad,
        "do_sample": True,
        "temperature": 0.3,
        "top_p": 0.9,
        "max_new_tokens": 256,
    }
    write_json(out / "generation_config.json", generation)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_dir / name, out / name)
    copy_log(run, out)


if __name__ == "__main__":
    export(*(Path(argument) for argument in sys.argv[1:4]))

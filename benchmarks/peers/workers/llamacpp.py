"""llama.cpp's library, through the plain bindings of llama-cpp-python, on token ids.

Weights are BF16, Q8_0 or Q4_0 in every matrix, the embedding included (`--pure`). A single prompt
goes to a context that keeps it, and whatever begins alike is not computed again: sequences share
cells of the cache, which llama.cpp's server does for one conversation but not for many. Other
batches go to a context with a cache for each sequence, as in llama-batched-bench.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.protocol import Engine, Options, num_equal, serve

FILE_TYPES = {"int8": "LLAMA_FTYPE_MOSTLY_Q8_0", "int4": "LLAMA_FTYPE_MOSTLY_Q4_0"}
MICRO_BATCH = 512  # tokens in one graph; llama-bench's default, and its best
SHARING_SEQUENCES = 16
NAMES = {  # of the Hugging Face layout, and llama.cpp's
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Item(NamedTuple):
    """One token of a batch."""

    token_id: int
    position: int
    sequence: int
    is_last: bool  # of what is there of its sequence: its logits are wanted


class LlamaCpp(Engine):
    packages = ("llama-cpp-python", "gguf", "numpy")

    def prepare(self, options: Options) -> None:
        import llama_cpp

        whole = Path(options.directory) / "model.gguf"
        if options.precision == "bf16":
            write_gguf(Path(options.checkpoint), whole)
            return
        plain = whole.with_name("bf16.gguf")
        write_gguf(Path(options.checkpoint), plain)
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread = options.num_threads
        params.ftype = getattr(llama_cpp, FILE_TYPES[options.precision])
        params.pure = True
        if llama_cpp.llama_model_quantize(bytes(plain), bytes(whole), ctypes.byref(params)):
            raise RuntimeError("llama_model_quantize failed; its words are in the worker's log")
        plain.unlink()

    def load(self, options: Options) -> None:
        import llama_cpp

        self._options = options
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        path = Path(options.directory) / "model.gguf"
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), params)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the model; its words are in the worker's log")
        self._batch = llama_cpp.llama_batch_init(options.max_batched_tokens, 0, 1)
        self._sharing = self._context(SHARING_SEQUENCES, options.max_len, shared=True)
        self._separate: tuple[tuple[int, int], Any] | None = None
        self._held: list[int] = []  # tokens in sequence 0 of `_sharing`

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        import llama_cpp

        limit = min(len(prompt) for prompt in prompts) - 1
        num_known = min(limit, *(num_equal(self._held, prompt) for prompt in prompts))
        if len(prompts) > 1 and num_known == 0:
            context = self._separate_context(len(prompts), max(map(len, prompts)) + num_tokens)
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        else:
            context = self._sharing
            memory = llama_cpp.llama_get_memory(context)
            for sequence in range(1, SHARING_SEQUENCES):
                llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
            llama_cpp.llama_memory_seq_rm(memory, 0, num_known, -1)
            for sequence in range(1, len(prompts)):
                llama_cpp.llama_memory_seq_cp(memory, 0, sequence, 0, num_known)
            self._held = prompts[0]
        items = [
            Item(token_id, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token_id in enumerate(prompt)
            if position >= num_known
        ]
        times: list[list[float]] = [[] for _ in prompts]
        for _ in range(num_tokens):
            following = []
            for item, token_id in self._decode(context, items):
                times[item.sequence].append(time.perf_counter())
                following.append(Item(token_id, item.position + 1, item.sequence, True))
            items = following
        return times

    def _context(self, num_sequences: int, num_cells: int, *, shared: bool) -> Any:
        import llama_cpp

        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_cells
        params.n_batch = self._options.max_batched_tokens
        params.n_ubatch = MICRO_BATCH
        params.n_seq_max = num_sequences
        params.n_threads = params.n_threads_batch = self._options.num_threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = shared
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context; its words are in the worker's log")
        return context

    def _separate_context(self, num_sequences: int, length: int) -> Any:
        """A context with a cache for each sequence; the last one is kept."""
        import llama_cpp

        size = (num_sequences, -(-length // 256) * 256)  # cells come in 256s
        if self._separate is None or self._separate[0] != size:
            if self._separate is not None:
                llama_cpp.llama_free(self._separate[1])
            self._separate = (size, self._context(size[0], size[0] * size[1], shared=False))
        return self._separate[1]

    def _decode(self, context: Any, items: list[Item]) -> Iterator[tuple[Item, int]]:
        """Compute tokens; each last one and the most likely token that follows it."""
        import llama_cpp
        import numpy as np

        size = self._options.max_batched_tokens
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            batch = self._batch
            batch.n_tokens = len(chunk)
            for row, item in enumerate(chunk):
                batch.token[row], batch.pos[row] = item.token_id, item.position
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, item.sequence
                batch.logits[row] = item.is_last
            if status := llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode returned {status}")
            for row, item in enumerate(chunk):
                if item.is_last:
                    logits = llama_cpp.llama_get_logits_ith(context, row)
                    array = np.ctypeslib.as_array(logits, shape=(self._options.vocab_size,))
                    yield item, int(array.argmax())


def write_gguf(checkpoint: Path, path: Path) -> None:
    """The checkpoint as GGUF: BF16 matrices, F32 norms, and the vocabulary if there is one."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    add_keys(writer, config, checkpoint / "tokenizer.json")
    for name, tensor in _tensors(checkpoint, config):
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_keys(writer: Any, config: dict[str, Any], tokenizer: Path) -> None:
    """What a file says of a Llama: sizes, vocabulary, and the tensor of Llama 3's scaling."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, tokenizer, config)
    if config["rope_scaling"]:
        writer.add_tensor("rope_freqs.weight", _frequency_factors(config))


def _add_tokenizer(writer: Any, file: Path, config: dict[str, Any]) -> None:
    """A byte-level BPE in the Hugging Face format, as llama.cpp has it; without a file, none."""
    import gguf

    if not file.exists():
        writer.add_tokenizer_model("none")
        return
    told = json.loads(file.read_text())
    vocab = told["model"]["vocab"]
    special = {token["content"] for token in told["added_tokens"] if token["special"]}
    words = sorted(vocab, key=vocab.__getitem__)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([control if word in special else normal for word in words])
    writer.add_token_merges([" ".join(pair) for pair in told["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _tensors(checkpoint: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """llama.cpp's name of each tensor, and its bytes (matrices) or float32 values (norms)."""
    import numpy as np

    with (checkpoint / "model.safetensors").open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    header.pop("__metadata__")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for full_name, entry in header.items():
        start, end = entry["data_offsets"]
        base = 8 + header_size
        bits = np.frombuffer(data, np.uint16, (end - start) // 2, base + start)
        bits = bits.reshape(entry["shape"])
        stem = full_name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("model.layers."):
            number, stem = stem.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{number}."
        name = NAMES[stem]
        if name in heads:  # the two halves of a head are interleaved there
            rows, columns = bits.shape
            half = rows // heads[name] // 2
            bits = bits.reshape(heads[name], 2, half, columns).swapaxes(1, 2).reshape(rows, columns)
        if bits.ndim == 1:
            yield f"{prefix}{name}.weight", (bits.astype(np.uint32) << 16).view(np.float32)
        else:
            yield f"{prefix}{name}.weight", np.ascontiguousarray(bits).view(np.uint8)


def _frequency_factors(config: dict[str, Any]) -> Any:
    """What llama.cpp divides each rotary frequency by, for Llama 3's scaling."""
    import numpy as np

    scaling, size = config["rope_scaling"], config["head_dim"]
    frequencies = config["rope_theta"] ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / (smooth + (1 - smooth) / scaling["factor"])).astype(np.float32)


if __name__ == "__main__":
    serve(LlamaCpp())

"""llama.cpp as a peer of bench/model.py: a random Q8_0 model of the same shape, run in a process of its own.

A GGUF file is written with the gguf package: the matrices, embedding and output head included, in Q8_0 (32 codes and
one float16 scale), everything else in float32.  The file has no tokenizer; tokens go in as ids.  llama.cpp is called
through llama-cpp-python's low-level functions, so that a step costs one `llama_decode` and an argmax; eight sequences
go into one batch.  Its cache holds float16, as is its default.  The process works only when it is told to.  With one
thread the clock is that of its processor time.

TinyLlama's shape is llama.cpp's architecture "llama".  OPT has no architecture there; "gpt2" has its very matrices
(q, k and v fused into one), learned positions and biases, with GELU in the place of ReLU.

    python bench/gguf_peer.py MODEL.gguf THREADS     answers one JSON request per line; bench/model.py starts it
"""

import ctypes
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 32  # codes that share a scale in Q8_0
DEVIATION = 0.02  # of a weight, as transformers initialises them

Tensors = dict[str, tuple[int, ...]]


def unavailable_because() -> str | None:
    """Why llama.cpp cannot run here, or None."""
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return (
        f"{' and '.join(missing)} not installed: pip install gguf; pip install llama-cpp-python (needs CMake and C++)"
    )


def _tensors(config: Any) -> tuple[str, Tensors]:
    """llama.cpp's architecture for a transformers config, and the shapes of its tensors in numpy's order."""
    width, vocabulary = config.hidden_size, config.vocab_size
    shapes: Tensors = {"token_embd.weight": (vocabulary, width), "output.weight": (vocabulary, width)}
    if config.model_type == "opt":
        shapes["position_embd.weight"] = (config.max_position_embeddings, width)
        matrices = {"attn_qkv": (3 * width, width), "attn_output": (width, width)}
        matrices |= {"ffn_up": (config.ffn_dim, width), "ffn_down": (width, config.ffn_dim)}
        architecture, biased = "gpt2", True
    elif config.model_type == "llama":
        heads = config.num_key_value_heads * (width // config.num_attention_heads)
        matrices = {"attn_q": (width, width), "attn_k": (heads, width), "attn_v": (heads, width)}
        matrices |= {"attn_output": (width, width), "ffn_down": (width, config.intermediate_size)}
        matrices |= dict.fromkeys(("ffn_gate", "ffn_up"), (config.intermediate_size, width))
        architecture, biased = "llama", False
    else:
        raise ValueError(f"no llama.cpp architecture is known here for {config.model_type!r}; there are opt and llama")
    norms = ["output_norm"]
    for i in range(config.num_hidden_layers):
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
        for name, shape in matrices.items():
            shapes[f"blk.{i}.{name}.weight"] = shape
            if biased:
                shapes[f"blk.{i}.{name}.bias"] = shape[:1]
    for name in norms:
        shapes[f"{name}.weight"] = (width,)
        if biased:
            shapes[f"{name}.bias"] = (width,)
    return architecture, shapes


def write_gguf(path: Path, config: Any, tokenizer: Path | None = None) -> None:
    """Write a model of this shape with random weights.

    Args:
        path: The file to make.
        config: An OPT or Llama config of transformers.
        tokenizer: A tokenizer.json of byte-level BPE that goes into the file; by default none does.
    """
    import gguf

    architecture, shapes = _tensors(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "llama":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    else:
        writer.add_feed_forward_length(config.ffn_dim)
        writer.add_layer_norm_eps(1e-5)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_tokenizer(writer, json.loads(tokenizer.read_text()), config.vocab_size)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(name, np.full(shape, float(name.endswith("norm.weight")), np.float32))
        elif name == "position_embd.weight":
            writer.add_tensor(name, (DEVIATION * random.standard_normal(shape)).astype(np.float32))
        else:
            writer.add_tensor(name, _random_q8_0(random, *shape), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, told: dict[str, Any], size: int) -> None:
    """A tokenizer of byte-level BPE, with tokens that nothing is made of up to the size of the vocabulary."""
    import gguf

    special = {entry["id"] for entry in told["added_tokens"]}
    by_id = {place: token for token, place in told["model"]["vocab"].items()}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id.get(i, f"[unused{i}]") for i in range(size)])
    writer.add_token_types(
        [kinds.CONTROL if i in special else kinds.NORMAL if i in by_id else kinds.UNUSED for i in range(size)]
    )
    writer.add_token_merges([" ".join(pair) for pair in told["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(size - 1)  # which random weights write as seldom as any other
    writer.add_add_bos_token(False)


def _random_q8_0(random: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Blocks of an (N, K) weight as bytes, (N, K / 32 * 34): uniform codes, whose deviation is 127 / sqrt(3)."""
    blocks = np.empty((n, k // BLOCK, 2 + BLOCK), np.uint8)
    scale = np.array([DEVIATION * 3**0.5 / 127], np.float16)
    blocks[..., :2] = scale.view(np.uint8)
    blocks[..., 2:] = random.integers(-127, 128, (n, k // BLOCK, BLOCK), np.int8).view(np.uint8)
    return blocks.reshape(n, -1)


class LlamaCpp:
    """One model in llama.cpp's process, for bench/model.py; see `model.Variant`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._answer()  # loaded

    def _ask(self, what: str, *arguments: int) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp's process has ended, with exit code {self._process.wait()}")
        return json.loads(line)

    def start(self, ids: Any, room: int) -> None:
        """Read a prompt of this shape, (B, T); the ids are others, which takes as long."""
        self._ask("start", *ids.shape, room)

    def tokens(self, count: int) -> list[float]:
        """Write tokens; returns the seconds that each took."""
        seconds: list[float] = self._ask("tokens", count)
        return seconds

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        self._ask("rewind")

    def prefill(self, ids: Any) -> float:
        """Seconds to read a prompt of this length."""
        return float(self._ask("prefill", ids.shape[1]))

    def stop(self) -> None:
        """Free what the last job needed."""
        self._ask("stop")


@contextmanager
def llama_cpp(config: Any, threads: int) -> Iterator[LlamaCpp]:
    """llama.cpp with a random model of this shape, ended on leaving."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "random-q8_0.gguf"
        write_gguf(path, config)
        command = [sys.executable, __file__, str(path), str(threads)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield LlamaCpp(process)
            finally:
                process.kill()


class _Session:
    """The other end: llama.cpp's context and its batch."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp as api

        self._clock = time.process_time if threads == 1 else time.perf_counter
        self._quiet = api.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        api.llama_log_set(self._quiet, ctypes.c_void_p())
        api.llama_backend_init()
        self._api, self._threads, self._context = api, threads, None
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._random = np.random.default_rng(0)

    def _open(self, sequences: int, room: int) -> None:
        self.stop()
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = sequences * room
        parameters.n_batch = max(512, sequences * room)
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = self._api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no context for {sequences} sequences of {room} tokens")
        self._batch = self._api.llama_batch_init(parameters.n_batch, 0, 1)

    def _step(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Decode ids (B, T) from this position on; the most likely token of each sequence."""
        sequences, length = ids.shape
        batch = self._batch
        batch.n_tokens = ids.size
        for i in range(ids.size):
            batch.token[i] = int(ids.flat[i])
            batch.pos[i] = position + i % length
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // length
            batch.logits[i] = i % length == length - 1
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        rows = [self._logits(length * (s + 1) - 1) for s in range(sequences)]
        return np.array([[row.argmax()] for row in rows])

    def _logits(self, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, i), (self._vocabulary,))

    def start(self, sequences: int, length: int, room: int) -> None:
        self._open(sequences, room)
        self._prompt = length
        self._next = self._step(self._random.integers(0, self._vocabulary, (sequences, length)), 0)
        if not np.isfinite(self._logits(length - 1)).all():
            raise RuntimeError("llama.cpp's logits are not finite")
        self._position = length

    def tokens(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            begin = self._clock()
            self._next = self._step(self._next, self._position)
            seconds.append(self._clock() - begin)
            self._position += 1
        return seconds

    def rewind(self) -> None:
        memory = self._api.llama_get_memory(self._context)
        for sequence in range(len(self._next)):
            self._api.llama_memory_seq_rm(memory, sequence, self._prompt, -1)
        self._position = self._prompt

    def prefill(self, length: int) -> float:
        if self._context is None:
            self._open(1, length)
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        ids = self._random.integers(0, self._vocabulary, (1, length))
        begin = self._clock()
        self._step(ids, 0)
        return self._clock() - begin

    def stop(self) -> None:
        if self._context is not None:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
            self._context = None


def _serve(path: str, threads: int) -> None:
    session = _Session(path, threads)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        print(json.dumps(getattr(session, what)(*arguments)), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))

"""Train the demo model: a small OPT that has read the docstrings of the Python standard library.

The package cannot fetch a model offline, so it carries one: `src/w8a8/demo_model`, about 3 MB, made by this
script and by nothing else.  It is an ordinary checkpoint,

    AutoTokenizer.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

so that what the package does can be seen on a model that was trained, and not only on random weights.

    tokenizer   byte-level BPE; the special tokens have the ids of OPT.  It adds none by itself: the tokens of
                a text are those of its characters, and who wants `</s>` in front puts it there.
    text        `w8a8.demo.corpus.training_text()`.  One in 20 stretches of about a module is kept for validation.
    model       pre-norm OPT; groups of 32, 64 and 128 divide the K of every linear layer.
    training    AdamW, warm-up, cosine.  The text is small and is read some fifteen times, so there is
                dropout and weight decay, and the weights kept are those with the lowest validation loss.
                The held-out text is read at the end, to be reported, and decides nothing.

Same interpreter, same libraries, same processor, same seed: same model.  Where others use the cores too,
`OMP_WAIT_POLICY` made a step up to eight times as fast: a thread that spins while it waits for its neighbour
keeps the neighbour off the core.

    OMP_WAIT_POLICY=PASSIVE python scripts/train_demo_model.py      # about 20 minutes on two cores
    python scripts/train_demo_model.py --steps 20 --out /tmp/m --log /tmp/m.log    # does it still run?
"""

import argparse
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from w8a8.demo.corpus import HELD_OUT, SEPARATOR, held_out_text, training_text

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 5_000_000
"""What the package can carry."""

BOS, PAD, EOS = 2, 1, 2
"""The ids of OPT: a text begins with the token that ends one, and padding is a token of its own."""

VALIDATION_EVERY = 20
STRETCH_CHARS = 16_000
"""About a module: the held-out text is made of unseen modules, not of unseen docstrings out of seen ones."""


@dataclass(frozen=True)
class Recipe:
    """All numbers of a training run."""

    steps: int = 3500
    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 6
    heads: int = 4
    window: int = 256
    batch: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    warmup: int = 300
    clip_norm: float = 1.0
    validate_every: int = 200
    bos_share: float = 0.25
    """Share of the training windows that begin, after `</s>`, where a docstring begins."""


def main() -> None:
    """Train, save, load again, compare, log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "w8a8" / "demo_model")
    parser.add_argument("--log", type=Path, default=ROOT / "docs" / "demo_model.log")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)

    torch.set_num_threads(2)
    log = Log(arguments.log)
    log.line(f"# {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}  scripts/train_demo_model.py")
    log.line(
        f"python {platform.python_version()}  torch {torch.__version__}  "
        f"transformers {transformers.__version__}  tokenizers {tokenizers.__version__}  "
        f"{platform.machine()}  {torch.get_num_threads()} threads"
    )
    log.line(str(recipe))

    train_stretches, validation_stretches = split(training_text())
    tokenizer = train_tokenizer(train_stretches, recipe)
    train_ids = encode(tokenizer, SEPARATOR.join(train_stretches))
    validation_ids = encode(tokenizer, SEPARATOR.join(validation_stretches))
    held_out_ids = encode(tokenizer, held_out_text())
    log.line(f"held-out modules: {', '.join(HELD_OUT)}")
    log.line(
        f"tokens: {len(train_ids)} training, {len(validation_ids)} validation, {len(held_out_ids)} held out "
        f"({len(held_out_text())} characters)"
    )

    model = train(train_ids, document_starts(tokenizer, train_stretches), validation_ids, recipe, log)
    float32_perplexity = math.exp(loss_nats(model, held_out_ids, recipe.window))
    save(model, tokenizer, arguments.out)

    loaded: Any = AutoModelForCausalLM.from_pretrained(arguments.out, dtype="auto")
    loaded_tokenizer: Any = AutoTokenizer.from_pretrained(arguments.out)
    assert loaded.dtype is torch.float16
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert encode(loaded_tokenizer, held_out_text()).equal(held_out_ids)
    float16_perplexity = math.exp(loss_nats(loaded, held_out_ids, recipe.window))
    unigram_perplexity = unigram(train_ids, held_out_ids, recipe)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    assert size <= MAX_BYTES, f"{arguments.out} has {size} bytes, more than {MAX_BYTES}"

    log.line(f"held-out perplexity, unigram model of the training text: {unigram_perplexity:.2f}")
    log.line(f"held-out perplexity, float32 as trained:      {float32_perplexity:.4f}")
    log.line(f"held-out perplexity, float16 as loaded again: {float16_perplexity:.4f}")
    log.line(f"{loaded.num_parameters()} parameters, {size} bytes in {len(list(arguments.out.iterdir()))} files")
    log.line(f"greedy:  {continuation(loaded, loaded_tokenizer, 'Return True if', sampled=False)!r}")
    log.line(f"sampled: {continuation(loaded, loaded_tokenizer, 'Return True if', sampled=True)!r}")
    log.line("")


class Log:
    """Appends lines to a file and prints them, with the seconds since the start where asked."""

    def __init__(self, path: Path) -> None:
        """Start the clock; the file is only added to."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._start = time.perf_counter()

    def line(self, text: str) -> None:
        """Print a line and append it to the file."""
        print(text, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def timed(self, text: str) -> None:
        """A line that begins with the seconds since the log was made."""
        self.line(f"{time.perf_counter() - self._start:6.0f} s  {text}")


def split(text: str) -> tuple[list[str], list[str]]:
    """The stretches of a text to train on, and those to validate on."""
    stretches: list[str] = []
    pending: list[str] = []
    for docstring in text.split(SEPARATOR):
        pending.append(docstring)
        if sum(map(len, pending)) >= STRETCH_CHARS:
            stretches.append(SEPARATOR.join(pending))
            pending = []
    if pending:
        stretches.append(SEPARATOR.join(pending))
    validation = stretches[VALIDATION_EVERY // 2 :: VALIDATION_EVERY]
    return [stretch for stretch in stretches if stretch not in validation], validation


def train_tokenizer(stretches: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds no special token by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=["<s>", "<pad>", "</s>"],  # ids 0, 1, 2 as in OPT, which does not use <s> either
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(stretches, trainer)
    fast: Any = PreTrainedTokenizerFast  # its constructor is untyped
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=recipe.window,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """The tokens of a text, (T,)."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def document_starts(tokenizer: PreTrainedTokenizerFast, stretches: list[str]) -> Tensor:
    """Where in the tokens of the joined stretches a docstring begins."""
    text = SEPARATOR.join(stretches)
    begins = {0}
    position = text.find(SEPARATOR)
    while position >= 0:
        begins.add(position + len(SEPARATOR))
        position = text.find(SEPARATOR, position + len(SEPARATOR))
    offsets = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    return torch.tensor([i for i, (begin, _) in enumerate(offsets) if begin in begins])


def train(train_ids: Tensor, starts: Tensor, validation_ids: Tensor, recipe: Recipe, log: Log) -> OPTForCausalLM:
    """The model with the weights that had the lowest validation loss, in float32."""
    torch.manual_seed(recipe.seed)
    model = new_model(recipe)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, recipe))
    best_loss, best_weights = math.inf, model.state_dict()
    running = 0.0
    for step in range(1, recipe.steps + 1):
        model.train()
        ids = windows(train_ids, starts, recipe)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += loss.item()
        if step % recipe.validate_every == 0 or step == recipe.steps:
            validation_loss = loss_nats(model, validation_ids, recipe.window)
            count = (step - 1) % recipe.validate_every + 1
            log.timed(f"step {step:5d}  train loss {running / count:.4f}  validation loss {validation_loss:.4f}")
            running = 0.0
            if validation_loss < best_loss:
                best_loss = validation_loss
                best_weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_weights)
    log.timed(f"kept the weights with validation loss {best_loss:.4f}")
    return model


def new_model(recipe: Recipe) -> OPTForCausalLM:
    """An untrained model.  Its dropout is that of the training; `save` writes a config without."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            word_embed_proj_dim=recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            ffn_dim=4 * recipe.hidden_size,
            max_position_embeddings=recipe.window,
            do_layer_norm_before=True,
            dropout=recipe.dropout,
            attention_dropout=0.0,
            layerdrop=0.0,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    )


def rate_at(step: int, recipe: Recipe) -> float:
    """The factor of the learning rate: linear warm-up, then a cosine down to a twentieth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def windows(ids: Tensor, starts: Tensor, recipe: Recipe) -> Tensor:
    """A random batch, (B, T)."""
    last = len(ids) - recipe.window
    begin = torch.randint(0, last + 1, (recipe.batch,))
    batch = ids[begin[:, None] + torch.arange(recipe.window)]
    starts = starts[starts <= last]
    rows = torch.nonzero(torch.rand(recipe.batch) < recipe.bos_share).flatten()
    begin = starts[torch.randint(0, len(starts), (len(rows),))]
    batch[rows, 0] = BOS
    batch[rows, 1:] = ids[begin[:, None] + torch.arange(recipe.window - 1)]
    return batch


def loss_nats(model: torch.nn.Module, ids: Tensor, window: int) -> float:
    """Mean loss of a scored token: windows do not overlap, the first token of each is not scored."""
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for begin in range(0, len(ids), 16 * window):
            batch = ids[begin : begin + 16 * window]
            whole = len(batch) // window * window
            for rows in (batch[:whole].view(-1, window), batch[None, whole:]):
                scored = rows[:, 1:]
                if scored.numel():
                    logits = model(input_ids=rows).logits[:, :-1].float()
                    total += torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1), scored.flatten(), reduction="sum"
                    ).item()
                    count += scored.numel()
    return total / count


def unigram(train_ids: Tensor, ids: Tensor, recipe: Recipe) -> float:
    """Perplexity of a model that knows nothing but how frequent each token is, plus one."""
    counts = torch.bincount(train_ids, minlength=recipe.vocab_size).double() + 1
    scored = ids[torch.arange(len(ids)) % recipe.window > 0]
    return math.exp(-(counts / counts.sum()).log()[scored].mean().item())


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the float16 checkpoint.  Changes the model to what was written."""
    untyped: Any = model  # transformers wraps `to` so that no checker sees through it,
    generation: Any = GenerationConfig  # and leaves this constructor untyped
    untyped.to(torch.float16).eval()
    model.config.dropout = 0.0
    model.config.dtype = torch.float16
    model.generation_config = generation(bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name of its own, which 4 does not know; both know the old one.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and a package is read by others than its maker


def continuation(model: Any, tokenizer: Any, prompt: str, *, sampled: bool) -> str:
    """A prompt and 60 tokens that the model puts after it."""
    torch.manual_seed(0)
    ids = encode(tokenizer, prompt)[None]
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if sampled else {"do_sample": False}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=ids.shape[1] + 60, **options)
    return str(tokenizer.decode(written[0]))


if __name__ == "__main__":
    main()

"""Let a model go on from a prompt, and measure how fast it does."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from w8a8.checkpoint.opening import Named, OpenedModel, open_model
from w8a8.defaults import usual_defaults
from w8a8.errors import ModelError
from w8a8.model.kinds import Asked, context_length

ASKED = Asked("going on from a prompt")


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.  `seconds` covers reading the prompt and writing."""

    prompt: str
    text: str
    new_tokens: int
    seconds: float

    @property
    def tok_per_s(self) -> float:
        return self.new_tokens / self.seconds


def continue_text(
    model: Named | OpenedModel, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> Continuation:
    """Write on from a prompt.

    Args:
        model: A causal language model with its tokenizer, or the name of one.
        prompt: Tokenised with the tokenizer's own special tokens; it must not be empty.
        max_new_tokens: The most tokens to write; fewer where the model ends the text.
        temperature: 0 takes the most likely token each time.
        seed: Of the sampling; the global generator is left as it was.

    Raises:
        ModelError: it is another kind of model; no tokenizer; an empty prompt, or one that leaves no room in the
            model's context.
    """
    there = open_model(model, ASKED)
    opened: Any = there.model
    if there.tokenizer is None:
        raise ModelError(f"{there.directory} has no tokenizer, so a prompt cannot be read; save one beside the model")
    with usual_defaults():
        inputs = there.tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    limit = context_length(there.model)
    if length == 0 or (limit is not None and length >= limit):
        raise ModelError(f"the prompt has {length} tokens; the model takes 1..{limit - 1 if limit else ''}")
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - length)
    ends = there.tokenizer.eos_token_id
    how = transformers.GenerationConfig(
        max_new_tokens=room,
        do_sample=temperature > 0,
        temperature=temperature or None,
        pad_token_id=next(number for number in (there.tokenizer.pad_token_id, ends, 0) if number is not None),
        eos_token_id=ends,
    )
    with torch.random.fork_rng(), torch.inference_mode(), usual_defaults():
        torch.manual_seed(seed)
        start = time.perf_counter()
        given = {key: inputs[key].to(there.model.device) for key in ("input_ids", "attention_mask")}
        out = opened.generate(**given, generation_config=how)
        seconds = time.perf_counter() - start
    new = out[0, length:]
    return Continuation(prompt, str(there.tokenizer.decode(new, skip_special_tokens=True)), int(new.numel()), seconds)

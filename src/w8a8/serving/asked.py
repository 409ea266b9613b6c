"""Requests to language models: what a body asks for, checked against the model, before anything computes.

OpenAI's fields, and those that local servers have beside them (`top_k`, `min_p`, `repetition_penalty`,
`chat_template_kwargs`).  A field that would be ignored is refused where that changes the answer (`n`, `logprobs`,
`response_format`, ...), and passes where it does not (`user`, `metadata`, ...).  The prompt is made into tokens here,
as the model will read it, so that one which does not fit is told with its length.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2

from w8a8.model.pretrained import Tokenizer
from w8a8.serving.fields import SHOWN, Body, flag, integer, number, only, readable, shown, text, wrong
from w8a8.serving.front import Checked
from w8a8.serving.mistakes import RefusedError
from w8a8.serving.sampling import Sampling

MOST_NEW = 1024
"""Tokens that are written where a request does not say how many, as in transformers' server."""

MOST_STOPS = 16

_LONGEST_ID = 20  # digits; Python makes no number of thousands of them

_PASSED = (
    *("user", "metadata", "store", "service_tier", "stream_options", "seed", "stream", "model", "parallel_tool_calls"),
)
_CHOOSING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias"),
)
_COMPLETION = ("prompt", "suffix", "max_tokens", "stop", "n", "best_of", "echo", "logprobs")
_CHAT = (
    *("messages", "max_tokens", "max_completion_tokens", "stop", "n", "logprobs", "top_logprobs", "tools"),
    *("tool_choice", "response_format", "modalities", "chat_template_kwargs"),
)
_RESPONSE = ("input", "instructions", "max_output_tokens", "tools", "tool_choice", "truncation", "text", "reasoning")
# what a field may be where nothing here reads it
_ONLY: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "tool_choice": ("auto",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "truncation": ("disabled",),
    "text": ({"format": {"type": "text"}},),
    "reasoning": ({},),
}


@dataclass(frozen=True)
class Wanted:
    """What a request asks of whoever writes its text.

    sampling: How tokens are chosen.
    stops: Texts that end the answer, and are not part of it.
    """

    sampling: Sampling
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Served:
    """The model as requests are checked against it.

    names: That it may be called by, the one that is told first.
    processor: Its tokenizer, or what has it.
    context: Tokens that it reads and writes at the most; None where that is not known.
    words: Tokens that it knows.
    defaults: How it chooses where a request does not say.
    penalties: Whether presence and frequency can be penalised.
    text_only: Whether messages are text alone.
    """

    names: Sequence[str]
    processor: Any
    context: int | None
    words: int
    defaults: Sampling
    penalties: bool = True
    text_only: bool = True

    @property
    def tokenizer(self) -> Tokenizer:
        found: Tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return found

    def completion(self, body: Body) -> Checked:
        """The check of `/v1/completions`."""
        wanted = self._wanted(body, (*_COMPLETION, *_CHOOSING))
        given = body.get("prompt")
        if isinstance(given, list) and len(given) == 1:
            given = given[0]
        if given is None:
            raise RefusedError("there is no prompt; send the text to go on from", param="prompt")
        prompt = readable(given, "prompt")
        count = len(self.tokenizer(prompt, verbose=False)["input_ids"])
        most = self._most(count, integer(body, "max_tokens", low=1), "prompt", "max_tokens")
        kept = {"prompt": prompt, "max_tokens": most, "suffix": text(body, "suffix")}
        return self._checked(body, kept, wanted)

    def chat(self, body: Body) -> Checked:
        """The check of `/v1/chat/completions`."""
        wanted = self._wanted(body, (*_CHAT, *_CHOOSING))
        messages = self._messages(body.get("messages"))
        tools = _objects(body, "tools")
        options = body.get("chat_template_kwargs")
        if options is not None and not isinstance(options, dict):
            raise wrong("chat_template_kwargs", options, "an object")
        count = self._rendered(messages, tools, options or {})
        given = integer(body, "max_completion_tokens", low=1) or integer(body, "max_tokens", low=1)
        most = None if count is None else self._most(count, given, "messages", "max_tokens")
        kept = {"messages": messages, "max_tokens": most or given, "tools": tools, "chat_template_kwargs": options}
        return self._checked(body, kept, wanted)

    def response(self, body: Body) -> Checked:
        """The check of `/v1/responses`; the length of its prompt is seen when it is read."""
        wanted = self._wanted(body, (*_RESPONSE, "temperature", "top_p"))
        self._has_template()
        given = body.get("input")
        if not given or not isinstance(given, str | list):
            raise wrong("input", given, "a text, or a list of messages")
        if isinstance(given, str):
            readable(given, "input")
        else:
            for place, item in enumerate(given):
                if not isinstance(item, dict):
                    raise wrong(f"input[{place}]", item, "an object")
                if item.get("type", "message") == "message":
                    self._message(item, f"input[{place}]")
        kept = {name: body.get(name) for name in ("input", "instructions", "tools")}
        text(body, "instructions")
        _objects(body, "tools")
        return self._checked(body, {**kept, "max_output_tokens": integer(body, "max_output_tokens", low=1)}, wanted)

    def _wanted(self, body: Body, known: Sequence[str]) -> Wanted:
        """What every request may ask, checked; and that it asks nothing else."""
        only(body, (*known, *_PASSED), self.names)
        for name, values in _ONLY.items():
            value = body.get(name)
            if name in known and value is not None and not any(value == v and type(value) is type(v) for v in values):
                raise RefusedError(f"{name} is {shown(value)}, which is not done here; leave it out", param=name)
        flag(body, "stream")
        return Wanted(self._sampling(body), _stops(body))

    def _sampling(self, body: Body) -> Sampling:
        found = {
            "temperature": number(body, "temperature", low=0, high=2),
            "top_p": number(body, "top_p", low=0, high=1),
            "min_p": number(body, "min_p", low=0, high=1),
            "top_k": integer(body, "top_k", low=-1, high=self.words),
            "repetition_penalty": number(body, "repetition_penalty", low=0.01, high=100),
            "presence_penalty": number(body, "presence_penalty", low=-2, high=2),
            "frequency_penalty": number(body, "frequency_penalty", low=-2, high=2),
        }
        asked: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
        if asked.get("top_k") == -1:
            asked["top_k"] = 0  # vLLM's word for all
        penalised = [name for name in ("presence_penalty", "frequency_penalty") if asked.get(name)]
        if penalised and not self.penalties:
            raise RefusedError(
                "presence_penalty and frequency_penalty are not known to this model's way of writing; use "
                "repetition_penalty",
                param=penalised[0],
            )
        if self.defaults.temperature == 0 and not asked.keys().isdisjoint(("top_p", "top_k", "min_p")):
            asked.setdefault("temperature", 1.0)  # who says which tokens may be drawn wants some drawn
        seed = integer(body, "seed", low=-(2**63), high=2**63 - 1)
        return replace(self.defaults, **asked, bias=self._bias(body), seed=seed)

    def _bias(self, body: Body) -> dict[int, float]:
        given = body.get("logit_bias") or {}
        if not isinstance(given, dict):
            raise wrong("logit_bias", given, "an object of token ids, each with a number")
        found = {}
        for name in given:
            if not name.isdecimal() or len(name) > _LONGEST_ID or int(name) >= self.words:
                raise wrong("logit_bias", name, f"token ids below {self.words}")
            found[int(name)] = number(given, name, low=-100, high=100) or 0.0
        return found

    def _messages(self, given: object) -> list[dict[str, object]]:
        self._has_template()
        if not isinstance(given, list) or not given:
            raise wrong("messages", given, "a list of messages, at least one")
        for place, message in enumerate(given):
            self._message(message, f"messages[{place}]")
        return given

    def _message(self, message: object, name: str) -> None:
        if not isinstance(message, dict):
            raise wrong(name, message, "an object with role and content")
        readable(message.get("role"), f"{name}.role")
        content, calls = message.get("content"), message.get("tool_calls")
        if calls is not None:
            _tool_calls(calls, f"{name}.tool_calls")
        if isinstance(content, list):
            for place, part in enumerate(content):
                self._part(part, f"{name}.content[{place}]")
        elif content is not None or calls is None:
            readable(content, f"{name}.content")

    def _part(self, part: object, name: str) -> None:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind in ("text", "input_text", "output_text"):
            readable(part.get("text"), f"{name}.text")
        elif self.text_only or not isinstance(kind, str):
            raise wrong(name, part, "a part of type text: this model reads text alone" if self.text_only else "a part")

    def _has_template(self) -> None:
        if getattr(self.processor, "chat_template", None) is None and self.tokenizer.chat_template is None:
            raise RefusedError(
                f"{self.names[0]} has no chat template, so messages cannot be made into a prompt; use /v1/completions "
                "with a prompt of your own",
                code="no_chat_template",
            )

    def _rendered(
        self, messages: list[dict[str, object]], tools: list[dict[str, object]] | None, options: Body
    ) -> int | None:
        """How many tokens the messages are by the model's template; None where they are not text alone."""
        if not self.text_only:
            return None
        from transformers.cli.serving.utils import BaseHandler, Modality

        told = BaseHandler.get_processor_inputs_from_messages(messages, Modality.LLM)
        try:
            found = self.processor.apply_chat_template(
                told, add_generation_prompt=True, tools=tools, tokenize=True, return_dict=True, **options
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:  # what a template says no with
            raise RefusedError(
                f"the model's chat template does not take these messages: {error}", param="messages"
            ) from error
        return len(found["input_ids"])

    def _most(self, count: int, asked: int | None, prompt: str, most: str) -> int:
        """How many tokens may be written behind a prompt."""
        if count == 0:
            raise RefusedError(f"{prompt} has no tokens; send some text", param=prompt)
        if self.context is None:
            return asked or MOST_NEW
        if count >= self.context:
            raise RefusedError(
                f"{prompt} has {count} tokens, and the model reads and writes {self.context} at the most; shorten it",
                param=prompt,
                code="context_length_exceeded",
            )
        if asked is not None and count + asked > self.context:
            raise RefusedError(
                f"{prompt} has {count} tokens and {most} is {asked}, together more than the {self.context} that the "
                f"model reads and writes; ask for at most {self.context - count}, or leave {most} out",
                param=most,
                code="context_length_exceeded",
            )
        return asked or min(MOST_NEW, self.context - count)

    def _checked(self, body: Body, kept: Body, wanted: Wanted) -> Checked:
        """The body that the application behind gets: what it reads, and nothing that it would read otherwise."""
        kept = {name: value for name, value in kept.items() if value is not None}
        return Checked({**kept, "model": self.names[0], "stream": bool(body.get("stream"))}, wanted)


def _stops(body: Body) -> tuple[str, ...]:
    given = body.get("stop")
    entries = [given] if isinstance(given, str) else given if given is not None else []
    if not isinstance(entries, list) or len(entries) > MOST_STOPS:
        raise wrong("stop", given, f"a text, or a list of at most {MOST_STOPS} texts")
    found = tuple(readable(entry, "stop") for entry in entries)
    if not all(found):
        raise RefusedError("stop has an empty text, which would end every answer; leave it out", param="stop")
    return found


def _objects(body: Body, name: str) -> list[dict[str, object]] | None:
    given = body.get(name)
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise wrong(name, given, "a list of objects")
    return given or None


def _tool_calls(given: object, name: str) -> None:
    """Calls that an assistant made: a function by name, with arguments that are an object, or the JSON of one."""
    if not isinstance(given, list):
        raise wrong(name, given, "a list of calls")
    for place, call in enumerate(given):
        function = (call.get("function") or call) if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        try:
            found = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise RefusedError(
                f"{name}[{place}] is {shown(call)[:SHOWN]}; expected a function with a name and arguments, the JSON of "
                "an object",
                param=name,
            )

"""The server of a language model: transformers' own application, with our engine behind it and our door before it.

Chat templates, tool calls, reasoning, the three ways of asking and the stream of events are transformers'; it asks a
`BaseGenerateManager` for the text, and that is ours: `Packed` where the model suits (`suits`), else `OneByOne`, which
is transformers' own with a client's leaving heard.  What their handlers would read otherwise than OpenAI's API says, or
leave out, does not reach them: the door takes it out of the body and hands it to the manager (`Wanted`).

What parses a text while it is written has other names in other versions of transformers (`**parsing`), and goes on as
it came.
"""

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, TypeAlias

import torch
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.routing import Route as Path
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    DirectStreamer,
    GenerateManager,
    GenerationState,
    _StreamError,
)

from w8a8.serving.answers import add_common
from w8a8.serving.asked import Served, Wanted
from w8a8.serving.engine import Ending, Engine, Ticket
from w8a8.serving.front import CLIENT, Front, Route
from w8a8.serving.mistakes import RefusedError
from w8a8.serving.sampling import Sampling
from w8a8.serving.stops import Stops

Inputs: TypeAlias = dict[str, Any]
Told: TypeAlias = "asyncio.Queue[tuple[list[int], Ending | None]]"


def language_app(model: PreTrainedModel, served: Served, engine: Engine | None, *, speech: bool = False) -> Front:
    """The application that answers for a language model.

    Args:
        engine: That generates for many; None has transformers generate, one request after another.
        speech: Whether the model writes down sound, which has one path of its own.
    """
    manager = ModelManager(device="cpu", model_timeout=-1)
    name = served.names[0]
    manager.force_model = name
    key = ModelManager.process_model_name(name)
    manager.loaded_models[key] = TimedModel(model, timeout_seconds=-1, processor=served.processor)
    state = _State(engine)
    handlers: dict[str, object] = {
        "chat_handler": ChatCompletionHandler(model_manager=manager, generation_state=state),
        "completion_handler": CompletionHandler(model_manager=manager, generation_state=state),
        "response_handler": ResponseHandler(model_manager=manager, generation_state=state),
        "transcription_handler": TranscriptionHandler(manager, state),
    }
    # handlers of later versions answer paths that do not exist here
    wanted = [p for p in inspect.signature(build_server).parameters if p.endswith("_handler") and p not in handlers]
    build: Any = build_server
    app = build(manager, generation_state=state, **handlers, **dict.fromkeys(wanted))
    app.add_exception_handler(RefusedError, _refuse)
    routes = {
        "/v1/completions": Route(served.completion),
        "/v1/chat/completions": Route(served.chat),
        "/v1/responses": Route(served.response),
    }
    if speech:
        routes = {"/v1/audio/transcriptions": Route(None)}
    ours: list[Path] = []
    add_common(routes, ours, served.names)
    app.router.routes[:0] = ours  # before theirs, which would look into a cache of the hub
    return Front(app, routes)


async def _refuse(_: Request, refused: Exception) -> JSONResponse:
    assert isinstance(refused, RefusedError)
    return JSONResponse(refused.body, status_code=refused.status)


class _State(GenerationState):
    """Which manager writes: always the one that there is."""

    def __init__(self, engine: Engine | None) -> None:
        super().__init__()
        one_by_one: Callable[[], OneByOne] = OneByOne  # untyped where it is transformers'
        self._ours: BaseGenerateManager = one_by_one() if engine is None else Packed(engine)

    def use_continuous_batching(self, *_: object, **__: object) -> bool:
        return isinstance(self._ours, Packed)

    def get_manager(self, *_: object, **__: object) -> BaseGenerateManager:
        return self._ours

    def shutdown(self) -> None:
        self._ours.stop()


class _Streamer(DirectStreamer):
    """transformers' streamer, fed from the event loop, whose cancelling gives a place back."""

    def __init__(self, leave: Callable[[], None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leave = leave

    def cancel(self) -> None:
        self._leave()


class Packed(BaseGenerateManager):
    """Has the engine write."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate_streaming(  # type: ignore[override]
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **parsing: Any
    ) -> tuple[asyncio.Queue[object], DirectStreamer]:
        """As transformers' manager: a queue of texts, and the streamer that fills it."""
        loop, wanted = asyncio.get_running_loop(), _wanted()
        queue: asyncio.Queue[object] = asyncio.Queue()
        told: Told = asyncio.Queue()
        ticket = self._ticket(inputs, gen_config, wanted, told, every=True)
        held = Stops(wanted.stops, queue.put_nowait, ticket.leave)
        rust = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = _Streamer(ticket.leave, rust, loop, held, **parsing)
        # the first is the prompt, which is not streamed
        streamer.put(torch.tensor(ticket.prompt, dtype=torch.long, device="cpu"))

        async def pump() -> None:
            ending = None
            while ending is None and not held.stopped:
                tokens, ending = await told.get()
                streamer.put(torch.tensor(tokens, dtype=torch.long, device="cpu"))
                await asyncio.sleep(0)  # what the streamer has put off until the loop is free
            if ending == "stop" or held.stopped:
                _ended_before_the_most(gen_config, streamer.total_tokens)
            if ending == "failed":
                held.put_nowait(_StreamError(_escaped(ticket.error)))
            elif not held.stopped:
                streamer.end()

        task = asyncio.ensure_future(pump())

        def done(_: object) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None:  # a text that cannot be parsed, say
                ticket.leave()
                queue.put_nowait(_StreamError(_escaped(error)))

        task.add_done_callback(done)
        CLIENT.get().left.append(task.cancel)
        self._engine.ask(ticket)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """As transformers' manager: the text, the length of the prompt, and the tokens."""
        wanted = _wanted()
        told: Told = asyncio.Queue()
        ticket = self._ticket(inputs, gen_config, wanted, told, every=bool(wanted.stops))
        tokenizer = getattr(processor, "tokenizer", processor)
        parts: list[object] = []
        held = Stops(wanted.stops, parts.append, ticket.leave)
        written: list[int] = []
        self._engine.ask(ticket)
        ending = None
        stream = _decoding(tokenizer) if wanted.stops else None
        while ending is None and not held.stopped:
            tokens, ending = await told.get()
            written += tokens
            for text in () if stream is None else stream(tokens):
                held.put_nowait(text)
        if ending == "failed":
            raise RefusedError(
                f"the server failed while it wrote ({ticket.error}); ask again",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
                code="engine_failed",
            )
        if ending == "stop" or held.stopped:
            _ended_before_the_most(gen_config, len(written))
        if stream is None:
            return tokenizer.decode(written, skip_special_tokens=True), len(ticket.prompt), written
        held.put_nowait(None)
        return "".join(part for part in parts if isinstance(part, str)), len(ticket.prompt), written

    def stop(self) -> None:
        self._engine.close()

    def _ticket(
        self, inputs: Inputs, gen_config: GenerationConfig, wanted: Wanted, told: Told, *, every: bool
    ) -> Ticket:
        """A ticket whose answers come into a queue of this loop; left when its client leaves."""
        loop = asyncio.get_running_loop()
        prompt = [int(token) for token in inputs["input_ids"]]
        room = self._engine.tokens - len(prompt)
        if not prompt or room <= 0:
            raise RefusedError(
                f"the prompt has {len(prompt)} tokens, and the model reads and writes {self._engine.tokens} at the "
                "most; shorten it",
                code="context_length_exceeded",
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, room)  # the handler tells by it how a text ended

        def tell(tokens: list[int], ending: Ending | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, (tokens, ending))

        ends = gen_config.eos_token_id
        listed = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        ticket = Ticket(prompt, gen_config.max_new_tokens, frozenset(listed), wanted.sampling, tell, every)
        CLIENT.get().left.append(ticket.leave)
        return ticket


class OneByOne(GenerateManager):
    """transformers' own generation, one request after another, each as it asks and ended when its client leaves."""

    def generate_streaming(  # type: ignore[override]
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **parsing: Any
    ) -> tuple[asyncio.Queue[object], DirectStreamer]:
        """As transformers' manager."""
        inputs = self._prepared(inputs, gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, **parsing)
        CLIENT.get().left.append(streamer.cancel)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """As transformers' manager."""
        inputs = self._prepared(inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)

    def _prepared(self, inputs: Inputs, gen_config: GenerationConfig) -> Inputs:
        """The inputs of `generate`, and in `gen_config` what was asked for."""
        wanted, left = _wanted(), threading.Event()
        CLIENT.get().left.append(left.set)
        asked = wanted.sampling
        gen_config.do_sample = asked.temperature > 0
        gen_config.temperature = asked.temperature or None
        gen_config.top_p, gen_config.min_p, gen_config.top_k = asked.top_p, asked.min_p or None, asked.top_k or None
        gen_config.repetition_penalty = asked.repetition_penalty
        gen_config.sequence_bias = {(token,): value for token, value in asked.bias.items()} or None
        gen_config.stop_strings = list(wanted.stops) or None
        if asked.seed is not None:
            self.submit(torch.manual_seed, asked.seed)  # by the thread that draws, and nothing comes between
        return {**inputs, "stopping_criteria": StoppingCriteriaList([_Left(left)])}


class _Left(StoppingCriteria):
    """Ends a text whose client is gone."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> Any:
        return torch.full((len(input_ids),), self._left.is_set(), dtype=torch.bool, device=input_ids.device)


def _wanted() -> Wanted:
    asked = CLIENT.get().asked
    return asked if isinstance(asked, Wanted) else Wanted(Sampling())


def _decoding(tokenizer: Any) -> Callable[[Iterable[int]], list[str]]:
    """Tokens in, the texts that they complete out."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream([], skip_special_tokens=True)

    def decoded(tokens: Iterable[int]) -> list[str]:
        found = [stream.step(tokenizer._tokenizer, token) for token in tokens]
        return [text for text in found if text is not None]

    return decoded


def _ended_before_the_most(gen_config: GenerationConfig, tokens: int) -> None:
    """Have a handler, which compares counts, tell that a text ended by itself, be it with its last token."""
    gen_config.max_new_tokens = tokens + 1


def _escaped(error: BaseException | None) -> str:
    """What went wrong, fit to stand between quotes in JSON, where transformers puts it as it is."""
    return json.dumps(f"the server failed while it wrote ({error})")[1:-1]

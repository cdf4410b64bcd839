"""A model that answers: loaded with its tokenizer, its adapter and its stop tokens; generates token by token."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from sft_recipe.chat.loading import load_module, load_settings
from sft_recipe.chat.sampling import Sampling
from sft_recipe.chat.source import ModelSource
from sft_recipe.chat.text_stream import IncrementalDecoder, Piece, ReasoningSplitter, StopStrings
from sft_recipe.data.rendering.prompt import Prompt
from sft_recipe.data.rendering.source_target import prompt_encoder
from sft_recipe.errors import ModelError, first_line
from sft_recipe.models.families import SEQ2SEQ, decoder_start_token_id, family_of

LOWEST_TEMPERATURE = 0.01  # lower ones are greedy decoding, without dividing logits by almost nothing
DEFAULT_TOP_K = 50  # of transformers, for a generation config that samples and does not set it

FinishReason = Literal["stop", "length", "canceled"]


@dataclass(frozen=True)
class Reply:
    """Holds an answer, the reasoning before it, why it ended, and the number of tokens of both and of the prompt.

    It ended with a stop token or stop string ("stop"), with the most tokens that it may have ("length"), or because
    the user or client did not want more ("canceled").
    """

    content: str
    reasoning: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


class ChatModel:
    """A ChatModel is a model with its tokenizer, on one device; one thread uses it at a time.

    `sampling` are the defaults of its generation config; `context_length` is the most tokens of prompt and answer, None
    where the model has no limit.
    """

    def __init__(self, source: ModelSource, device: torch.device, trust_remote_code: bool = False):
        """Load the model. Raises ModelError where model, adapter, tokenizer or generation config cannot be used."""
        self.name, self.device = source.name, device
        config, self.tokenizer = load_settings(source, trust_remote_code)
        self.family = family_of(config)
        self.encode_prompt = prompt_encoder(self.tokenizer, self.family, source.options)
        generation = _read_generation_config(source.settings, config)
        self.sampling = _default_sampling(generation)
        self.stop_token_ids = _stop_token_ids(generation, self.tokenizer.eos_token_id)
        text = config.get_text_config(decoder=True)
        self.context_length: int | None = getattr(text, "max_position_embeddings", None)
        self.decoder_start_id = decoder_start_token_id(config) if self.family is SEQ2SEQ else None
        self._module = load_module(source, config, device, trust_remote_code)
        self._module.generation_config = GenerationConfig()  # all options are given with each answer
        self.context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def without_adapter(self, name: str) -> "ChatModel":
        """Return the base model under this name: the same weights, with the adapter off while it answers."""
        base = copy(self)
        base.name, base.context = name, self._module.disable_adapter
        return base

    def room(self, prompt: Prompt) -> int | None:
        """Return how many tokens the context has left for an answer, 0 or more; None where there is no limit.

        An encoder-decoder's answer has another context than the prompt.
        """
        if self.context_length is None:
            return None
        left = max(self.context_length - len(prompt.ids), 0)
        return self.context_length - 1 if left and self.family is SEQ2SEQ else left

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling,
        emit: Callable[[Piece], None] = lambda piece: None,
        cancel: threading.Event | None = None,
    ) -> Reply:
        """Return the answer to a prompt that leaves room for one.

        `emit` receives its pieces while they are generated; `cancel` ends it after the next token. Raises ModelError
        where the device has too little memory, and where logits are NaN.
        """
        room = self.room(prompt)
        length = sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room)
        stream = _Stream(self, prompt, sampling, emit, cancel or threading.Event())
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        ids = torch.tensor([prompt.ids], device=self.device)
        try:
            with self.context(), torch.inference_mode():
                self._module.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._generation_config(sampling, length),
                    streamer=stream,
                    logits_processor=LogitsProcessorList([_RefusesNaN(self.name)]),
                    stopping_criteria=StoppingCriteriaList([stream.criterion]),
                )
        except torch.OutOfMemoryError:
            raise ModelError(
                f"{self.device} has too little free memory for {len(prompt.ids)} tokens and an answer; shorten the "
                "conversation, or start a new one"
            ) from None
        return stream.reply(len(prompt.ids))

    def _generation_config(self, sampling: Sampling, length: int) -> GenerationConfig:
        choice: dict[str, Any] = {"do_sample": False}
        if sampling.temperature >= LOWEST_TEMPERATURE:
            names = ("temperature", "top_p", "top_k")
            choice = {"do_sample": True} | {name: getattr(sampling, name) for name in names}
        return GenerationConfig(
            max_new_tokens=length,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=self.stop_token_ids or None,
            pad_token_id=self.stop_token_ids[0] if self.stop_token_ids else 0,
            decoder_start_token_id=self.decoder_start_id,
            **choice,
        )


class _Stream(BaseStreamer):
    """Receives the tokens of an answer from transformers, and emits them as pieces of text."""

    def __init__(
        self,
        model: ChatModel,
        prompt: Prompt,
        sampling: Sampling,
        emit: Callable[[Piece], None],
        cancel: threading.Event,
    ):
        self._decoder = IncrementalDecoder(model.tokenizer)
        self._stops = StopStrings(sampling.stop)
        self._splitter = ReasoningSplitter(prompt.opens_reasoning)
        self._emit, self._cancel = emit, cancel
        self._stop_tokens = set(model.stop_token_ids)
        self._unwritten = self._stop_tokens | ({model.tokenizer.bos_token_id} if model.family is SEQ2SEQ else set())
        self._texts: dict[str, list[str]] = {"reasoning": [], "answer": []}
        self._tokens: list[int] = []
        self._has_prompt = False
        self.criterion = _StopsWhen(lambda: self._stops.found or self._cancel.is_set())

    def put(self, value: torch.Tensor) -> None:
        """Take the next token; the first call of transformers passes the prompt."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        (token,) = value.flatten().tolist()
        self._tokens.append(token)
        if token not in self._unwritten:
            self._feed(self._decoder.put(token))

    def end(self) -> None:
        """Emit what was held back."""
        self._feed(self._decoder.end())
        for piece in [*self._splitter.feed(self._stops.end()), *self._splitter.end()]:
            self._take(piece)

    def _feed(self, text: str) -> None:
        for piece in self._splitter.feed(self._stops.feed(text)):
            self._take(piece)

    def _take(self, piece: Piece) -> None:
        self._texts[piece.kind].append(piece.text)
        self._emit(piece)

    def reply(self, prompt_tokens: int) -> Reply:
        """Return what was generated."""
        texts = {kind: "".join(parts) for kind, parts in self._texts.items()}
        return Reply(texts["answer"], texts["reasoning"], self._finish_reason(), prompt_tokens, len(self._tokens))

    def _finish_reason(self) -> FinishReason:
        if self._stops.found or (self._tokens and self._tokens[-1] in self._stop_tokens):
            return "stop"
        return "canceled" if self._cancel.is_set() else "length"


class _RefusesNaN(LogitsProcessor):
    """Raises ModelError where a logit is NaN: greedy decoding would take a token of no meaning."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise ModelError(
                f"{self._name} computes logits that are NaN: its weights are damaged, or training diverged"
            )
        return scores


class _StopsWhen(StoppingCriteria):
    """Ends generation when a function returns True."""

    def __init__(self, is_done: Callable[[], bool]):
        self._is_done = is_done

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._is_done(), device=input_ids.device, dtype=torch.bool)


def _read_generation_config(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # of many types, depending on the value
        raise ModelError(f"{folder}/generation_config.json cannot be used: {first_line(error)}") from None


def _default_sampling(generation: GenerationConfig) -> Sampling:
    settings: Any = generation
    penalty = {"repetition_penalty": settings.repetition_penalty}
    if not settings.do_sample:
        return Sampling().updated(penalty)
    top_k = DEFAULT_TOP_K if settings.top_k is None else settings.top_k
    temperature = 1.0 if settings.temperature is None else settings.temperature
    return Sampling().updated({**penalty, "temperature": temperature, "top_p": settings.top_p, "top_k": top_k})


def _stop_token_ids(generation: GenerationConfig, eos: int | None) -> list[int]:
    """The end tokens of the generation config, in which a run's export has those of training, and eos."""
    known: Any = generation.eos_token_id
    ends = known if isinstance(known, list) else [known]
    return list(dict.fromkeys(token for token in [*ends, eos] if token is not None))

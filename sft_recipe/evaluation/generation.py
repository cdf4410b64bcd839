"""Answers of the model to prompts of the validation data and to fixed ones, with their scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from sft_recipe.config.schema import Config
from sft_recipe.config.trainer import EvalConfig
from sft_recipe.data.rendering.options import RenderOptions
from sft_recipe.data.rendering.source_target import prompt_encoder
from sft_recipe.data.run_inputs import RunInputs, render_options
from sft_recipe.data.token_store import Examples
from sft_recipe.errors import ConfigError
from sft_recipe.evaluation.scores import Scores, score, tool_calls
from sft_recipe.models.families import CAUSAL, SEQ2SEQ, Family

TOOL_MATCH = "eval/tool_match"
HALF_CHARACTER = "\ufffd"  # what the first bytes of a character are decoded to
# prompts, largest number of new tokens, tokens that end an answer, tokens of a batch -> continuations
Generate = Callable[[Sequence[Sequence[int]], int, Sequence[int], int], list[list[int]]]


@dataclass(frozen=True)
class Prompt:
    """The tokens up to the start of an assistant turn; `reference` is what the data answers, None for fixed prompts."""

    set: str
    ids: list[int]
    reference: list[int] | None


@dataclass(frozen=True)
class Sample:
    """Holds one answer of the model. `is_truncated`: it reached the largest number of tokens before its end token."""

    set: str
    prompt: str
    reference: str | None
    answer: str
    is_truncated: bool


@dataclass(frozen=True)
class GenerationResult:
    """All answers, and the scores of those with a reference; None where there is none."""

    samples: list[Sample] = field(default_factory=list)
    scores: Scores | None = None

    def metrics(self) -> dict[str, float]:
        """Return eval/bleu4 and the others; eval/truncated and eval/empty count answers with a reference."""
        if self.scores is None:
            return {}
        scored = [sample for sample in self.samples if sample.reference is not None]
        found = {
            "eval/bleu4": self.scores.bleu4,
            "eval/rouge_l": self.scores.rouge_l,
            "eval/exact_match": self.scores.exact_match,
            "eval/truncated": sum(sample.is_truncated for sample in scored),
            "eval/empty": sum(not sample.answer.strip() for sample in scored),
            "eval/samples": len(scored),
        }
        return found | ({} if self.scores.tool_match is None else {TOOL_MATCH: self.scores.tool_match})


class AnswerGenerator:
    """Answers the same prompts at each evaluation: `generate` of the validation data, and `prompts`."""

    def __init__(
        self,
        config: EvalConfig,
        sets: dict[str, Examples],
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Sequence[int],
        generate: Generate,
        token_budget: int,
        family: Family = CAUSAL,
        options: RenderOptions = RenderOptions(),  # noqa: B008  # frozen
    ):
        """`end_ids` end an answer; a batch holds about `token_budget` tokens.

        The fixed prompts are encoded for a model of the `family`, with the `options` of the data.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.end_ids = list(end_ids)
        self.generate = generate
        self.token_budget = token_budget
        self.family = family
        self.options = options
        self.prompts = [*self._fixed_prompts(), *_validation_prompts(sets, config.generate)]

    def run(self) -> GenerationResult:
        """Answer all prompts, shared among the ranks. Collective; all ranks get the same result."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        own = self.prompts[rank::ranks]
        answers = self.generate(
            [prompt.ids for prompt in own], self.config.max_new_tokens, self.end_ids, self.token_budget
        )
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, answers)
        ordered = [gathered[number % ranks][number // ranks] for number in range(len(self.prompts))]
        samples = [self._sample(prompt, answer) for prompt, answer in zip(self.prompts, ordered, strict=True)]
        pairs = [(sample.answer, sample.reference) for sample in samples if sample.reference is not None]
        return GenerationResult(samples, score(*map(list, zip(*pairs, strict=True))) if pairs else None)

    def expects_tool_calls(self) -> bool:
        """Return whether any reference calls a tool, so that there is an eval/tool_match."""
        return any(tool_calls(self._text(prompt.reference)) for prompt in self.prompts if prompt.reference)

    def _sample(self, prompt: Prompt, answer: list[int]) -> Sample:
        is_truncated = not answer or answer[-1] not in self.end_ids
        reference = None if prompt.reference is None else self._text(prompt.reference)
        text = self._text(answer)
        if is_truncated:
            text = text.rstrip(HALF_CHARACTER)
        return Sample(prompt.set, self._text(prompt.ids), reference, text, is_truncated)

    def _text(self, ids: list[int]) -> str:
        """The text before the end token. Other special tokens stay: some mark tool calls.

        Those that a tokenizer puts around the texts of an encoder-decoder do not.
        """
        ids = ids[:-1] if ids and ids[-1] in self.end_ids else ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=self.family is SEQ2SEQ))

    def _fixed_prompts(self) -> list[Prompt]:
        if not self.config.prompts:
            return []
        encode = prompt_encoder(self.tokenizer, self.family, self.options)
        questions = [[{"role": "user", "content": text}] for text in self.config.prompts]
        return [Prompt("prompts", encode(messages).ids, None) for messages in questions]


def _validation_prompts(sets: dict[str, Examples], count: int) -> list[Prompt]:
    """The first examples of each set in turn, `count` together, each up to its last supervised turn."""
    longest = max(map(len, sets.values()), default=0)
    chosen = [(name, index) for index in range(longest) for name, examples in sets.items() if index < len(examples)]
    return [_prompt(name, *sets[name][index]) for name, index in chosen[:count]]


def _prompt(name: str, ids: np.ndarray, mask: np.ndarray) -> Prompt:
    supervised = np.flatnonzero(mask)
    gaps = np.flatnonzero(np.diff(supervised) > 1)
    begin, end = int(supervised[gaps[-1] + 1 if len(gaps) else 0]), int(supervised[-1]) + 1
    return Prompt(name, ids[:begin].tolist(), ids[begin:end].tolist())


def answer_generator(config: Config, inputs: RunInputs, generate: Generate) -> AnswerGenerator | None:
    """Return what answers the prompts of a run; None where there are none. Raises ConfigError where the run would stop
    early by calls of tools, and no reference has one.
    """
    evaluation, answers = config.eval, None
    if evaluation.generate or evaluation.prompts:
        ends, budget, options = inputs.stop_token_ids(), config.data.token_budget, render_options(config, inputs.date)
        answers = AnswerGenerator(
            evaluation, inputs.validation, inputs.tokenizer, ends, generate, budget, inputs.family, options
        )
    if config.trainer.early_stopping.metric == TOOL_MATCH and not (answers and answers.expects_tool_calls()):
        raise ConfigError(f"trainer.early_stopping.metric={TOOL_MATCH}: no answer of the data calls a tool")
    return answers

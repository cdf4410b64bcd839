"""Fixtures of the tests on GPUs that do not exist."""

import pytest
import transformers

from sft_recipe.engine.rehearsal.session import RehearsalSession
from sft_recipe.errors import PreflightError

SIZES = dict(
    vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "Gemma2": {},
    "Gemma3Text": dict(sliding_window=128),
    "GptOss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=128, layer_types=None),
    "Mistral": {},
    "Phi3": {},
}


@pytest.fixture(scope="session")
def session():
    """The process that rehearses; skips where there is no compiler, or a PyTorch with CUDA."""
    rehearsal = RehearsalSession()
    try:
        rehearsal.__enter__()
    except PreflightError as error:
        pytest.skip(str(error))
    yield rehearsal
    rehearsal.__exit__()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Return a function: the folder of a model with a config.json and no weights."""

    def build(family: str, **sizes) -> str:
        settings = {**SIZES, "head_dim": None, **FAMILIES[family], **sizes} if sizes else {**SIZES, **FAMILIES[family]}
        config = getattr(transformers, f"{family}Config")(**{k: v for k, v in settings.items() if v is not None})
        config.architectures = [f"{family.removesuffix('Text')}ForCausalLM"]
        path = tmp_path_factory.mktemp(family)
        config.save_pretrained(path)
        return str(path)

    return build

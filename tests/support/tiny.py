"""Build tiny tokenizers and models, so that most tests need neither a download nor time."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Hello there, how are you today? I am fine, thank you. What is the capital of France? Paris.",
    "system user assistant prompt response question answer The quick brown fox jumps over the lazy dog.",
    "你好，今天天气怎么样？很好，谢谢。请解释什么是机器学习。机器学习是人工智能的一个分支。",
    "def add(a, b):\n    return a + b\n\n1 2 3 4 5 6 7 8 9 0\n\nUSER: ASSISTANT: [INST] [/INST]",
]


def build_tokenizer(
    chat_template: str | None = CHATML,
    special_tokens: list[str] = SPECIAL,
    eos_token: str = "<|im_end|>",
    vocab_size: int = 512,
    **kwargs,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a few sentences; it represents every byte."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos_token,
        pad_token=special_tokens[0],
        clean_up_tokenization_spaces=False,
        **kwargs,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_model(folder: Path, tokenizer=None, seed: int = 0, **overrides) -> Path:
    """Save a two-layer Llama with random weights and its tokenizer as a Hugging Face folder."""
    tokenizer = tokenizer or build_tokenizer()
    settings = dict(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    set_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)

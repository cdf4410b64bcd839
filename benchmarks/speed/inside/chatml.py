"""The job's chat format, for the systems without a template, and to count the expected tokens."""


def encode(tokenizer, messages):
    """Token ids of the prompt, and of the answer through <|im_end|>; `tokenizer` is one of the package tokenizers."""
    *before, answer = messages
    prompt = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in before)
    texts = prompt + "<|im_start|>assistant\n", answer["content"] + "<|im_end|>"
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids for text in texts)

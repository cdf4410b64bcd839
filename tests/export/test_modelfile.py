"""The Modelfile's template renders what the chat template renders; a chat template that it cannot follow is refused."""

import re

import pytest

from sft_recipe.errors import ModelError
from sft_recipe.export.modelfile import modelfile, render_go
from tests.support import tiny

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are Tiny.<|im_end|>\\n' }}{% endif %}"
    + tiny.CHATML
)
OTHER = (
    "<|endoftext|>{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }}\n"
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}<|im_end|>{% else %}[{{ m['content'] }}] "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TRIMS = tiny.CHATML.replace("message['content']", "message['content'] | trim")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny.CHATML
DROPS_FIRST = tiny.CHATML.replace("in messages", "in messages[-3:]")


def template_of(text: str) -> str:
    return re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]


def test_chatml_is_written_by_hand():
    text = modelfile("model-f16.gguf", tiny.build_tokenizer(), ["<|im_end|>"])
    end = r'{{ "<|im_end|>\n" }}'
    parts = [
        r'{{ if eq .Role "system" }}{{ "<|im_start|>system\n" }}{{ .Content }}',
        r'{{ else if eq .Role "user" }}{{ "<|im_start|>user\n" }}{{ .Content }}',
        r'{{ else if eq .Role "assistant" }}{{ "<|im_start|>assistant\n" }}{{ .Content }}',
    ]
    body = "".join(part + end for part in parts)
    template = "{{ range .Messages }}" + body + r'{{ end }}{{ end }}{{ "<|im_start|>assistant\n" }}'
    assert text == f'FROM ./model-f16.gguf\nTEMPLATE """{template}"""\nPARAMETER stop "<|im_end|>"\n'


@pytest.mark.parametrize("template", [tiny.CHATML, DEFAULT_SYSTEM, OTHER])
@pytest.mark.parametrize("has_system", [True, False])
def test_template_renders_the_same_text(template, has_system):
    tokenizer = tiny.build_tokenizer(template)
    turns = [("system", "rules")] * has_system + [("user", "a }} b"), ("assistant", " c "), ("user", "d\n")]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_go(template_of(modelfile("m", tokenizer, [])), turns) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [(TRIMS, "does more than put texts"), (NO_SYSTEM, "no system turn"), (DROPS_FIRST, "does more than put texts")],
)
def test_template_that_does_more_is_refused(template, message):
    with pytest.raises(ModelError, match=message):
        modelfile("m", tiny.build_tokenizer(template), [])


def test_refusal_is_printed_and_in_the_card(tmp_path, capsys):
    from sft_recipe.cli.export import main

    folder = tiny.build_model(tmp_path / "model", tiny.build_tokenizer(TRIMS))
    assert main([str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]) == 0
    assert "no Modelfile: the chat template does more" in capsys.readouterr().out
    assert not (tmp_path / "out/Modelfile").exists()
    assert "no Modelfile: the chat template does more" in (tmp_path / "out/README.md").read_text()

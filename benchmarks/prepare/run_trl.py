"""python run_trl.py CORPUS.jsonl TOKENIZER CACHE (completion|assistant) (PROCESSES|default): SFTTrainer's preparation.

completion: `prompt` and `completion`, and the loss on the completion, TRL's default for such data.
assistant: `messages`, assistant_only_loss, and the template with {% generation %} marks that this needs.
The trainer is given a model of next to no size, made before the clock starts.
"""

import sys

from clock import tell
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

PLAIN = "message['content'] + '<|im_end|>'"
MARKED = (
    "'' }}{% if message['role'] == 'assistant' %}{% generation %}{{ " + PLAIN + " }}{% endgeneration %}"
    "{% else %}{{ " + PLAIN + " }}{% endif %}{{ ''"
)

corpus, tokenizer_folder, cache, loss, processes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
if loss == "assistant":
    if PLAIN not in tokenizer.chat_template:
        sys.exit("the chat template is not the one that this benchmark knows how to mark")
    tokenizer.chat_template = tokenizer.chat_template.replace(PLAIN, MARKED)
shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
config = SFTConfig(
    output_dir=f"{cache}/trainer",
    max_length=2048,
    assistant_only_loss=loss == "assistant",
    dataset_num_proc=None if processes == "default" else int(processes),
    use_cpu=True,
    bf16=False,
    report_to="none",
    disable_tqdm=True,
)
tell("begin")
dataset = load_dataset("json", data_files=corpus, split="train", cache_dir=cache)
prepared = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer).train_dataset
tell("ready", examples=len(prepared))

tokens = supervised = 0
for batch in prepared.with_format("numpy").iter(1000):
    tokens += sum(len(ids) for ids in batch["input_ids"])
    supervised += sum(int((labels != -100).sum()) for labels in batch["labels"])
tell("counted", tokens=tokens, supervised=supervised)

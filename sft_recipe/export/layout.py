"""The names of exported models in a checkpoint folder."""

MODEL = "huggingface"
ADAPTER = "lora_adapter"

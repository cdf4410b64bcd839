"""A small byte-level tokenizer whose special tokens are the markers of a chat template."""

import re
from functools import cache

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.support import tiny

# The spelling of special tokens in published vocabularies. <think> and the like are ordinary tags.
MARKER = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|<｜[^<>｜\n]{1,40}｜>|<\|\w+>|<\w+\|>|\[\|\w+\|\]|\[/?[A-Z]{3,}(?:_[A-Z]+)*\]|\]~!?b[\]\[]|\[e~\["
    r"|<SPECIAL_\d+>|</?(?:s|bos|eos|sep|role|system|user|human|assistant|ai|longcat_s|_\w+)>|<seed:[be]os>"
    r"|<(?:start|end)_of_(?:turn|utterance|message|sentence)>|<(?:start|end)_function_\w+>|<beginning_of_sentence>"
    r"|<(?:user|bot|reserved)_?\d+>"
)
# The tokens at which generation stops, in published vocabularies; the first that a template has is its eos.
ENDS = [
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<｜end▁of▁sentence｜>",
        "<|return|>",
    ),
    *("<|end|>", "<|eom_id|>", "<|call|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eos|>", "<|eot|>"),
    *("<end_of_utterance>", "<|end_of_turn|>", "<|role_end|>", "<|endofturn|>", "[|endofturn|]", "<|EOT|>", "[e~["),
    *("<|end_of_role|>", "<seed:eos>", "<SPECIAL_11>", "<SPECIAL_12>", "<SPECIAL_68>", "<end_of_sentence>", "<sep>"),
    *(
        "<|end_of_sentence|>",
        "</assistant>",
        "</longcat_s>",
        "<|assistant_end|>",
        "<_end>",
        "<|message_sep|>",
        "<|END|>",
    ),
    *(
        "<｜hy_place▁holder▁no▁2｜>",
        "<｜hy_eos｜>",
        "<｜hy_eos:opensource｜>",
        "<｜hy_Assistant｜>",
        "<|endofresponse|>",
    ),
    *("<|im:end|>", "<|eom|>", "<|cos|>", "<|endofmessage|>", "<|tools_suffix|>", "<|end_turn|>", "<|end_of_msg|>"),
    *("<|tool_response>", "<|calls|>", "<start_function_response>", "<end_of_message>"),
]


def build_tokenizer(source: str, rendered: str = "") -> PreTrainedTokenizerFast:
    """Return a tokenizer with this chat template; the markers in it and in `rendered` are its special tokens."""
    markers = sorted({*MARKER.findall(source), *MARKER.findall(rendered), "<|bos|>", "<|eos|>"})
    eos = "<|eos|>" if "eos_token" in source else next(token for token in ENDS if token in markers)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_vocabulary()),
        bos_token="<|bos|>",
        eos_token=eos,
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in markers])
    tokenizer.chat_template = source
    return tokenizer


@cache
def _vocabulary() -> str:
    return tiny.build_tokenizer(None, ["<|pad|>"], "<|pad|>").backend_tokenizer.to_str()

"""Turns a conversation into token ids and a loss mask.

    conversation
      -> rendered text                 chat_template.py   the tokenizer's chat template is the reference
      -> skeleton                      skeleton.py        the conversation with a slot in place of each text
      -> mask plan                     mask_plan.py       where the template puts each slot, and which parts to train on
      -> filled text with spans        annotate.py        the plan with the texts filled in; equals the rendered text
      -> tokens                        text_tokens.py     token ids, and the characters of each token
      -> ids and mask                  renderer.py        1 on the tokens of each span

A mask plan depends on the skeleton alone, so that one plan serves all conversations with the same skeleton.
"""

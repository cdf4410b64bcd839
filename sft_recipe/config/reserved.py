"""Variables of chat templates that nobody can set; this module needs no package, since --help comes before them."""

# What the chat template gets from the conversation or from training.
NOT_TEMPLATE_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")

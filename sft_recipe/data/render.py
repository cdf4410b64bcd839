"""The public name of the renderer: `from sft_recipe.data.render import Renderer, RenderOptions`."""

from sft_recipe.data.rendering.renderer import Encoded, Renderer, RenderOptions
from sft_recipe.models.tokenizer import ensure_chat_template

__all__ = ["Encoded", "RenderOptions", "Renderer", "ensure_chat_template"]

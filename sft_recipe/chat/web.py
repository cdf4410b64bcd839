"""The chat page of the server: one self-contained file that uses the server's own API and no other network."""

from importlib.resources import files

from sft_recipe.display import page_environment


def chat_page() -> str:
    """Return the page as HTML."""
    script = files("sft_recipe.chat").joinpath("web.js").read_text(encoding="utf-8")
    return page_environment("sft_recipe.chat", "", "en", str, script).get_template("web.html").render()

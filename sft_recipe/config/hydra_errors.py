"""Explains errors of Hydra and OmegaConf in terms of keys and files, without their internals."""

import re

from hydra.errors import MissingConfigException
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from sft_recipe.config.validation import nearest

REFERENCES = "${optim.lr} refers to another key, ${oc.env:NAME} to an environment variable"
ENTRIES = "an entry of the defaults list names a group and a file of its folder in conf/, such as model: default"
INTERNAL = re.compile(r"\n\s*(full_key|object_type|reference_type)[:=].*|^\w+ raised while [\w ]+:\s*")


def explain_value(error: OmegaConfBaseException) -> str:
    """Return what is wrong with a value, such as a reference ${...} to another one, and at which key."""
    reason = INTERNAL.sub("", str(error)).strip().strip('"')
    if isinstance(error, GrammarParseError):
        reason = "its reference is not complete"
    hint = f". {REFERENCES}" if isinstance(error, GrammarParseError | InterpolationResolutionError) else ""
    return f"{error.full_key or 'a value'} cannot be resolved: {reason}{hint}"


def explain_composition(error: Exception, root: str, groups: tuple[str, ...]) -> str:
    """Return why Hydra cannot compose the file that it calls `root`, with the choices where one does not exist."""
    if isinstance(error, OmegaConfBaseException) and "interpolation" in str(error).lower():
        return explain_value(error)
    first, *more = str(error).strip().split("\n\n")
    text = INTERNAL.sub("", re.sub(rf"^In '{re.escape(root)}': ", "", first)).strip(" .\n")
    if not isinstance(error, MissingConfigException):
        return text
    listed = next((part for part in more if part.startswith("Available options")), "").split("Config search path")[0]
    choices = [line.strip() for line in listed.splitlines() if line.startswith("\t")]
    group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
    if choices:
        return f"{text}; the choices are {', '.join(choices)}.{nearest(choice, choices)}"
    return f"{text}; {ENTRIES}.{nearest(group or choice, list(groups))}"

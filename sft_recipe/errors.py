"""What a user can cause: each kind ends the program with exit code 2 and its message, without a traceback."""

import os


def is_debugging() -> bool:
    """SFT_DEBUG=1 shows tracebacks and what libraries print."""
    return os.environ.get("SFT_DEBUG", "0").lower() not in ("", "0", "false")


class RecipeError(Exception):
    """One clear message: what is wrong, where, and what to do about it."""

    exit_code = 2


class ConfigError(RecipeError):
    """A flag, key or value that cannot be used."""


class DataError(RecipeError):
    """A data file or record that cannot be used; the message names file, record and field.

    `kind` sorts bad records that are counted: malformed, fields, type, empty, roles, tools, template, length.
    """

    def __init__(self, message: str, kind: str = "fields"):
        super().__init__(message, kind)  # both, so that it survives the way back from another process
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


class ModelError(RecipeError):
    """A model or tokenizer that cannot be found, loaded or trained."""


class PreflightError(RecipeError):
    """The machine cannot do what was asked: GPUs, disk, packages."""


class CheckpointError(RecipeError):
    """A checkpoint that cannot be resumed from, or a place that cannot be written."""


class TrainingError(RecipeError):
    """Training itself went wrong in a way that the user can mend, such as a loss that is no longer a number."""

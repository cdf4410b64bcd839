"""Errors that a user can cause: each ends the program with its exit code and one message, without a traceback.

Notices that end nothing are printed here too.
"""

import errno
import logging
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATH_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP)  # of a path that the user named, wherever it is used
SHOWN_PATH = 300  # characters
# What pip installs for them.
BITSANDBYTES, LIGER, MEGATRON = "-e '.[bitsandbytes]'", "-e '.[liger]'", "-e '.[megatron]'"


def is_debugging() -> bool:
    """Return True if SFT_DEBUG=1 asks for tracebacks and for the output of libraries."""
    return os.environ.get("SFT_DEBUG", "0").lower() not in ("", "0", "false")


def silence_libraries(shows_progress: bool = True) -> None:
    """Hide the warnings that libraries print about themselves, and their progress bars unless `shows_progress`.

    Must run before the libraries are imported. Does nothing with SFT_DEBUG=1.
    """
    if is_debugging():
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not shows_progress:
        os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")


def notify(text: str) -> None:
    """Print one line about the configuration on stderr, once per machine; unlike an error it ends nothing."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"notice: {text}", file=sys.stderr, flush=True)


def pip_install(what: str) -> str:
    """Return the command that installs `what` into the environment of this process, which need not be the shell's."""
    python = Path(sys.executable)
    if (pip := shutil.which("pip")) and Path(pip).parent == python.parent:
        return f"pip install {what}"
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{shown} -m pip install {what}"


@contextmanager
def packages_required() -> Iterator[None]:
    """Inside, a package that is not installed is one message on stderr and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        if is_debugging() or not _is_foreign(error):
            raise
        print(f"error: {_explain_missing(error)}", file=sys.stderr, flush=True)
        sys.exit(RecipeError.exit_code)


def _is_foreign(error: ModuleNotFoundError) -> bool:
    return error.name is not None and error.name.partition(".")[0] != __package__


def _explain_missing(error: ModuleNotFoundError) -> str:
    return (
        f"the package {error.name} is not installed for {sys.executable}. Start with ./train.sh or a script of "
        "scripts/, which find or install an environment, or activate it first: . .venv/bin/activate"
    )


class RecipeError(Exception):
    """The message says what is wrong, where, and what to do about it."""

    exit_code = 2


class ConfigError(RecipeError):
    """A flag, key or value is invalid."""


class DataError(RecipeError):
    """A data file or record is invalid; the message names file, record and field.

    `kind` classifies invalid records for counting: malformed, fields, type, empty, roles, tools, template, length.
    """

    def __init__(self, message: str, kind: str = "fields"):
        super().__init__(message, kind)  # both, so that the error can be pickled by a worker process
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


class ModelError(RecipeError):
    """A model or tokenizer cannot be found, loaded or trained."""


class PreflightError(RecipeError):
    """The machine lacks what the configuration needs: GPUs, disk space, packages."""


class CheckpointError(RecipeError):
    """A checkpoint cannot be resumed from, or a folder cannot be written."""


class TrainingError(RecipeError):
    """Training failed in a way that the user can fix, such as a loss that is not finite."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_command(command: Callable[[], int], reports_errors: Callable[[], bool] = lambda: True) -> int:
    """Run a command and return its exit code; a RecipeError, a missing package or a bad path is one message on stderr.

    `reports_errors` decides, after an error, whether this process prints it. SFT_DEBUG=1 adds the traceback. A reader
    that closes the pipe early (`| head`) ends the command without a message; a full disk below stdout is one message,
    and so is a Ctrl-C.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer goes nowhere
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in PATH_ERRORS and error.filename:
            problem = PreflightError(f"{str(error.filename)[:SHOWN_PATH]}: {error.strerror}")
            return _report(problem, reports_errors)
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        where = str(error.filename or "the output")[:SHOWN_PATH]
        print(f"error: {where} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
        return RecipeError.exit_code
    except ModuleNotFoundError as error:
        if not _is_foreign(error):
            raise
        return _report(PreflightError(_explain_missing(error)), reports_errors)
    except RecipeError as error:
        return _report(error, reports_errors)


def _report(error: RecipeError, reports_errors: Callable[[], bool]) -> int:
    if is_debugging():
        traceback.print_exc()
    if reports_errors():
        print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code

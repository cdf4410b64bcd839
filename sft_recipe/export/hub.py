"""Uploads an export to the Hugging Face hub; nothing else here contacts a network."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from sft_recipe.errors import ConfigError, PreflightError, first_line


def check_login(repository: str) -> None:
    """Check that `repository` can be uploaded to, before an export that may take long.

    Raises ConfigError for a name that is none, PreflightError without a login and where the hub cannot be reached.
    """
    try:
        if repository.count("/") != 1:
            raise HFValidationError("expected OWNER/NAME")
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub {repository}: {first_line(error)}") from None
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise PreflightError(
            "--push_to_hub: not logged in to the Hugging Face hub; run `hf auth login`, or set HF_TOKEN to a "
            "token that can write"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise PreflightError(
            f"--push_to_hub: the hub refuses the login or is not reachable: {_reason(error)}"
        ) from None


def push(folder: Path, repository: str) -> str:
    """Upload the files of `folder` into `repository`, created as a private one; returns its address.

    Raises PreflightError; the folder stays.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload model")
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise PreflightError(
            f"the export is in {folder}, but was not uploaded: {_reason(error)}. Upload it with `hf upload "
            f"{repository} {folder}`"
        ) from None
    return str(address)


def _reason(error: Exception) -> str:
    return first_line(error).rstrip(".")

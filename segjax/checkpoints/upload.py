"""Uploads a folder to a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.huggingface import parsed_address


def repository_of(address: str) -> str:
    """The repository "owner/name" of the address hf:owner/name.

    Raises:
      CheckpointError: The address is invalid, or huggingface_hub is not installed or has no token.
    """
    repository, revision = parsed_address(address)
    if revision is not None:
        raise CheckpointError(f"{address}: uploads go to the branch main; omit @{revision}")
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise CheckpointError(f'{address}: needs huggingface_hub: pip install "segjax[hub]"') from None
    if huggingface_hub.get_token() is None:
        raise CheckpointError(
            f"{address}: there is no token of the Hub: log in with `hf auth login`, or set HF_TOKEN to one with "
            "write access (https://huggingface.co/settings/tokens)"
        )
    return repository


def upload(folder: Path, repository: str) -> str:
    """Uploads all files of a folder in one commit; creates the repository if there is none.

    Returns:
      The address of the repository for a browser.

    Raises:
      CheckpointError: The Hub refuses, or cannot be reached; the message has the reason.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"hf:{repository}: HF_HUB_OFFLINE is set; unset it to upload")
    api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT)
    try:
        address = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with segjax")
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise CheckpointError(
                f"hf:{repository}: the token has no write access (the Hub answers {status}); log in with another one: "
                "`hf auth login`, or choose your own repository"
            ) from None
        raise CheckpointError(f"hf:{repository}: the Hub answers {status}: {_first_line(error)}") from None
    except Exception as error:
        # Networks, proxies and the Hub each raise their own errors.
        raise CheckpointError(f"hf:{repository}: cannot be uploaded ({_first_line(error)})") from None
    return address


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

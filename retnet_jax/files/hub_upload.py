"""Uploads of a model's directory to the Hugging Face hub.

`check_can_upload` checks the name and the token before there is a directory, `upload` uploads it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from retnet_jax.errors import CheckpointError, ConfigError, brief
from retnet_jax.files.hub import LOG_IN, REPOSITORY
from retnet_jax.files.paths import AnyPath


def check_can_upload(repository: str) -> None:
    """Checks a name to upload to, and asks the hub whether the user's token is valid.

    Raises:
      ConfigError: for a name that is not OWNER/NAME, without a valid token, and if huggingface_hub
        is not installed.
      CheckpointError: if the hub cannot be reached.
    """
    if re.fullmatch(REPOSITORY, repository, re.ASCII) is None or repository.endswith(".git"):
        raise ConfigError(
            f"{repository!r} is not a name for a model on the Hugging Face hub: expected "
            "OWNER/NAME of letters, digits, '-', '_' and '.', such as my-name/retnet-quickstart"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"{repository} is uploaded with huggingface_hub: pip install 'retnet-jax[hub]'"
        ) from error
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            f"uploading {repository} needs a login: {LOG_IN}, with a token that may write "
            "(https://huggingface.co/settings/tokens)"
        )
    with _explaining(repository):
        huggingface_hub.HfApi().whoami()


def upload(directory: AnyPath, repository: str, private: bool) -> str:
    """Uploads the files of a directory as one model on the hub; returns its URL.

    The model is created if it does not exist. Otherwise a commit is added to it, which also
    deletes safetensors files that the directory does not have.

    Args:
      directory: Local directory.
      repository: OWNER/NAME.
      private: Whether a new model can be seen by its owner only; an existing one must be private.

    Raises:
      ConfigError: if the user may not write there, or if `private` and the model is public.
      CheckpointError: if the upload does not succeed for another reason.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with _explaining(repository):
            url = api.create_repo(repository, private=private or None, exist_ok=True)
            would_publish = private and not api.model_info(repository).private
            if not would_publish:
                api.upload_folder(
                    repo_id=repository,
                    folder_path=str(directory),
                    delete_patterns=["*.safetensors", "*.safetensors.index.json"],
                    commit_message="Upload with retnet-jax",
                )
    except (ConfigError, CheckpointError) as error:
        again = f"{directory} is complete; to upload it later: hf upload {repository} {directory}"
        again += " --private" if private else ""
        raise type(error)(f"{error}\n{again}") from error
    if would_publish:
        raise ConfigError(
            f"{url} exists and is public, so nothing was uploaded\n{directory} is complete; make "
            f"the model private in its settings, and then: hf upload {repository} {directory}"
        )
    return str(url)


@contextlib.contextmanager
def _explaining(repository: str) -> Iterator[None]:
    """Raises the client's errors during an upload as one line that says what would help."""
    from huggingface_hub import constants, errors

    try:
        yield
    except Exception as raised:  # of many types, also those of the client's HTTP library
        page = f"{constants.ENDPOINT}/{repository}"
        error = raised.__cause__ if type(raised) is RuntimeError and raised.__cause__ else raised
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise ConfigError(
                f"{constants.ENDPOINT} does not accept the token: {LOG_IN}, with a valid token"
            ) from error
        if status == 403:
            raise ConfigError(
                f"{page} cannot be written to with this token (403): give a name whose owner you "
                f"are, or {LOG_IN}, with a token that may write there"
            ) from error
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise CheckpointError(
                f"{page} cannot be uploaded while HF_HUB_OFFLINE is set: unset it"
            ) from error
        reason = f"the hub answered {status}" if status else type(error).__name__
        what = "try again later" if status else "check the connection and HF_ENDPOINT"
        raise CheckpointError(
            f"{page} cannot be uploaded ({reason}: {brief(error)}): {what}"
        ) from error

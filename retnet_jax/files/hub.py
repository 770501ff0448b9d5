"""Models on the Hugging Face hub, downloaded where a model's directory is expected.

    model_directory("runs/mine")                 a path: nothing is downloaded
    model_directory("fla-hub/retnet-1.3B-100B")  a name on the hub
    model_directory("hf://OWNER/NAME@REVISION")  a branch, a tag or a commit

OWNER/NAME is a path if OWNER is a directory; hf:// always means the hub. The files are downloaded
by `huggingface_hub` into its own cache. It also resumes and retries, shows the progress, and reads
HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from etils import epath

from retnet_jax.errors import CheckpointError, ConfigError, brief
from retnet_jax.files.paths import AnyPath, expanded, place

# Only files in the top directory of a repository are downloaded.
CONFIG_AND_TOKENIZER = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.bpe", "*.spm", "*.jinja")
SAFETENSORS = "*.safetensors"
# Only if there are no safetensors files: one file, or several and an index.
TORCH = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_PARTS = "pytorch_model*.bin"

_PREFIX = "hf://"
# A wrong split, columns that do not fit, a package that is missing; HTTP libraries raise others.
_NOT_OF_THE_NETWORK = (ValueError, TypeError, LookupError, ImportError, FileNotFoundError)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
REPOSITORY = r"(?!.*(?:--|\.\.))\w(?:[\w-]*\w)?/\w(?:[\w.-]*\w)?"  # as the hub allows


class HubName(NamedTuple):
    """The name of a model on the hub.

    Attributes:
      repository: OWNER/NAME.
      revision: Branch, tag or commit; None: the newest commit.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return _PREFIX + "@".join(filter(None, self))


def model_directory(model: AnyPath, revision: str | None = None) -> epath.Path:
    """The directory of a model, whose files are downloaded first if `model` is a name on the hub.

    Args:
      model: Path or URL of a directory, or a name on the hub.
      revision: Branch, tag or commit on the hub; None: the one in the name, or the newest commit.

    Raises:
      ConfigError: for a name or a revision that does not exist or needs a login, for a path with a
        revision, and if huggingface_hub is not installed.
      CheckpointError: if the hub cannot be reached and the cache has no commit of the model, or if
        the repository has no weights to read. A commit in the cache is used with a warning.
    """
    name = hub_name(model)
    if revision is not None and name is None:
        raise ConfigError(
            f"revision={revision!r} needs a name on the Hugging Face hub, but {model} is a path: "
            "leave the revision out"
        )
    if revision is not None and name is not None:
        if name.revision not in (None, revision):
            raise ConfigError(f"{model} and revision={revision!r}: give only one of the revisions")
        name = name._replace(revision=revision)
    return place(model) if name is None else place(_with_weights(name))


def tokenizer_directory(tokenizer: str) -> str:
    """As `model_directory`, for the directory of a tokenizer; weights are not downloaded."""
    name = hub_name(tokenizer)
    return expanded(tokenizer) if name is None else str(_downloaded(name, CONFIG_AND_TOKENIZER))


def hub_name(model: AnyPath) -> HubName | None:
    """The name on the hub that a text stands for; None: it is a path. Nothing is requested.

    Raises:
      ConfigError: if a text begins with hf:// but is not such a name, or is the address of a page.
    """
    if not isinstance(model, str):
        return None
    if re.match(r"hf:/|https?://", model, re.IGNORECASE):
        found = re.fullmatch(rf"{_PREFIX}({REPOSITORY})(?:@(.+))?", model, re.ASCII)
        if found is None:
            raise ConfigError(f"{model}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
        return HubName(*found.groups())
    is_name = re.fullmatch(REPOSITORY, model, re.ASCII) is not None
    return HubName(model) if is_name and not os.path.isdir(model.split("/")[0]) else None


def cached_name(directory: AnyPath) -> HubName | None:
    """The name and the commit of a directory in the cache of the hub; None for any other."""
    found = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/(\w+)/*$", str(directory))
    return None if found is None else HubName(f"{found[1]}/{found[2]}", found[3])


def _with_weights(name: HubName) -> Path:
    """The directory of a model's downloaded files: safetensors if there are any, else PyTorch's."""
    directory = _downloaded(name, [*CONFIG_AND_TOKENIZER, SAFETENSORS])
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{name} has no config.json in its top directory, which must hold the model's sizes: "
            f"download it (hf download {name.repository} --local-dir DIRECTORY), add the file, "
            "and give DIRECTORY"
        )
    if any(directory.glob(SAFETENSORS)):
        return directory
    same_commit = name._replace(revision=directory.name)
    torch = TORCH_PARTS if (directory / TORCH_INDEX).is_file() else TORCH
    directory = _downloaded(same_commit, [*CONFIG_AND_TOKENIZER, torch])
    if any(directory.glob(torch)):
        return directory
    raise CheckpointError(
        f"{name} has no weights in its top directory: expected {SAFETENSORS}, {TORCH}, "
        f"or {TORCH_INDEX} with its files; to read "
        f"other files, download them first: hf download {name.repository} --local-dir DIRECTORY"
    )


def _downloaded(name: HubName, patterns: Sequence[str]) -> Path:
    """The directory of one commit in the client's cache, with all files that match a pattern.

    If the hub refuses or cannot be reached, a commit that is in the cache is used, with a warning.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{_if_not_a_path(name)}{name} is downloaded with huggingface_hub: pip install "
            "'retnet-jax[hub]'"
        ) from error
    revision, warning = _commit_to_use(name)
    try:
        directory = snapshot_download(
            name.repository,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # of many types, also those of the client's HTTP library
        raise _explained(error, name) from error
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return Path(directory)


def _commit_to_use(name: HubName) -> tuple[str | None, str | None]:
    """The commit in the cache if it is the newest, or if the hub does not say; else the revision.

    The second value is what to warn of if the files of that commit are used. `snapshot_download`
    does not say whether the hub answered. So the hub is asked here, and not again for a commit that
    is in the cache.
    """
    from huggingface_hub import HfApi, constants, errors

    revision = name.revision or constants.DEFAULT_REVISION
    folder = f"models--{name.repository.replace('/', '--')}"
    cached = Path(constants.HF_HUB_CACHE, folder, "refs", revision)
    if not cached.is_file():  # nothing is in the cache, or the revision is a commit
        return name.revision, None
    commit = cached.read_text()
    try:
        newest = HfApi().model_info(name.repository, revision=revision).sha
    except errors.OfflineModeIsEnabled:
        return commit, None
    except errors.RevisionNotFoundError as error:
        raise _explained(error, name) from error
    except Exception as error:  # of many types, also those of the client's HTTP library
        reason = _explained(error, name._replace(revision=revision))
        return commit, (
            f"{name} is read from the cache, at commit {commit}; there may be a newer one: {reason}"
        )
    return (commit if newest == commit else name.revision), None


def dataset_commit(name: str, revision: str | None = None) -> str:
    """The commit of a data set's revision, or its newest; raises as `model_directory`."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError(
            f"{name} is downloaded with huggingface_hub: pip install 'retnet-jax[corpora]'"
        ) from error
    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # of many types, also those of the client's HTTP library
        raise _explained(error, HubName(f"datasets/{name}", revision)) from error


def dataset_error(
    error: BaseException, name: str, revision: str | None = None
) -> ConfigError | CheckpointError:
    """An error of the library `datasets` as one line that says what would help.

    Args:
      error: The error, while the library opens or reads a data set.
      name: OWNER/NAME of the data set.
      revision: Branch, tag or commit of the data set; None: the newest commit.
    """
    from huggingface_hub import constants, errors

    page, chain = f"{constants.ENDPOINT}/datasets/{name}", [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for cause in chain:
        if isinstance(cause, errors.HfHubHTTPError | errors.OfflineModeIsEnabled):
            return _explained(cause, HubName(f"datasets/{name}", revision))
    what = f"{type(error).__name__}: {brief(error)}"
    if not isinstance(error, _NOT_OF_THE_NETWORK):
        return CheckpointError(
            f"{page} cannot be downloaded ({what}): check the connection and HF_ENDPOINT, and give "
            "the same command again"
        )
    try:
        dataset_commit(name, revision)  # `datasets` does not say why there is no such data set
    except (ConfigError, CheckpointError) as reason:
        return reason
    return ConfigError(f"{page} cannot be read ({what})")  # such as a wrong split


def _explained(error: BaseException, name: HubName) -> ConfigError | CheckpointError:
    """The client's error as one line that says what would help."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the reason why the cache was tried
    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{name.repository}"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    path, is_data = _if_not_a_path(name), name.repository.startswith("datasets/")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(
            f"{page} has no revision {name.revision or 'main'}: give a branch, a tag or a commit"
        )
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(
            f"{page} is only for users who accepted its conditions: accept them there, and {LOG_IN}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(
            f"{path}{page} does not exist, or is private: correct the name{_suggestion(name)}; for "
            f"a private {'data set' if is_data else 'model'} {LOG_IN}"
        )
    if status in (401, 403):
        return ConfigError(f"{page} cannot be read ({status}): {LOG_IN}")
    if isinstance(error, errors.OfflineModeIsEnabled) and is_data:
        return CheckpointError(f"{page} cannot be downloaded while HF_HUB_OFFLINE is set: unset it")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError(
            f"{path}{name} is not (completely) in the cache {constants.HF_HUB_CACHE}: unset "
            "HF_HUB_OFFLINE to download it"
        )
    if status == 429:
        seconds = response.headers.get("Retry-After") if response is not None else None
        return CheckpointError(
            f"{hub} refuses more requests for now (429): try again "
            f"{f'in {seconds} seconds' if seconds else 'later'}; for more requests {LOG_IN}"
        )
    if status is not None:
        return CheckpointError(
            f"{page} cannot be downloaded, because the hub answered {status}: try again later "
            "(complete files are kept)"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return CheckpointError(
            f"{name} cannot be written to the cache {constants.HF_HUB_CACHE} ({brief(error)}): "
            "make room there, or set HF_HOME to another directory"
        )
    return CheckpointError(
        f"{path}{page} cannot be downloaded ({type(error).__name__}: {brief(error)}): check the "
        "connection and HF_ENDPOINT, and try again (complete files are kept)"
    )


def _if_not_a_path(name: HubName) -> str:
    """The beginning of a message about a name that may have been meant as a path; or ""."""
    is_data = name.repository.startswith("datasets/")
    if name.revision or is_data or os.path.isdir(name.repository):  # it was not meant as a path
        return ""
    return f"{name.repository} is no directory in {os.getcwd()}, and "


def _suggestion(name: HubName) -> str:
    """The most similar names on the hub, for the message about one that does not exist; or ""."""
    from huggingface_hub import HfApi

    is_data = name.repository.startswith("datasets/")
    listed = HfApi().list_datasets if is_data else HfApi().list_models
    given = name.repository.removeprefix("datasets/")
    owner, _, last = given.rpartition("/")
    # Of the same owner, whose names are compared without it; if none is similar, of all owners.
    tried = [(owner, None, f"{owner}/")] if owner else []
    for author, search, begin in (*tried, (None, last, "")):
        known: dict[str, str] = {}
        with contextlib.suppress(Exception):  # a suggestion must not hide the error
            found = listed(author=author, search=search, limit=1000)
            known = {x.id.removeprefix(begin).lower(): x.id for x in found if x.id != given}
        compared = given.removeprefix(begin).lower()
        if close := difflib.get_close_matches(compared, known, n=3, cutoff=0.7):
            return f" (did you mean {' or '.join(known[x] for x in close)}?)"
    return ""

"""A directory that is whole goes to the hub, through huggingface_hub: a repository, and its files.

Weights that the repository has and the directory has not are removed with it: another number of files, or one file
where there were several, would leave some of an earlier model, which loaders may take for this one's.
"""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in __all__

from w8a8.checkpoint.beside import README
from w8a8.checkpoint.card import addressed
from w8a8.checkpoint.files import CONFIG, INDEX
from w8a8.errors import HubError

_STALE = ["*.safetensors", INDEX]
_NETWORK: Any = next(each for each in HfHubHTTPError.__bases__ if each is not OSError)
"""What huggingface_hub's HTTP library raises where no server answers; which library that is differs by version."""


def check_push(repository: str) -> None:
    """What can be known before the work of pushing to a repository.

    Raises:
        HubError: it is no name of a repository, huggingface_hub is offline, or there is no token.
    """
    try:
        validate_repo_id(repository)
        well_formed = repository.count("/") == 1
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise HubError(
            f"{repository!r} is no repository of the hub: give OWNER/NAME, letters, digits, '-', '_' and '.'"
        )
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{repository} cannot be pushed to while HF_HUB_OFFLINE is set: unset it, or push later")
    if get_token() is None:
        raise HubError(f"pushing to {repository} takes a token, and none was found: `hf auth login`, or set HF_TOKEN")


def push_to_hub(directory: str | Path, repository: str, *, private: bool | None = None) -> str:
    """Upload a saved directory; the repository is made where it is not there.

    Args:
        directory: Whole.  Its model card gets the repository's name in the place of the directory's.
        repository: OWNER/NAME.
        private: Of a new repository: None is what the owner's settings say.  True with one that is there and public is
            an error.

    Returns:
        The address of the repository.

    Raises:
        HubError: as `check_push`; there is no model in the directory; the hub cannot be reached, or refuses; the
            repository is public.  The directory stays, and the message says how to go on.
    """
    directory = Path(directory)
    check_push(repository)
    if not (directory / CONFIG).is_file():
        raise HubError(f"{directory} was to be pushed to {repository}, and has no {CONFIG}: give a saved directory")
    readme = directory / README
    again = shlex.join(["hf", "upload", repository, str(directory), ".", *(["--private"] if private else [])])
    api = HfApi()
    try:
        if readme.is_file():
            readme.write_text(addressed(readme.read_text(encoding="utf-8"), repository), encoding="utf-8")
        address = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise HubError(
                f"{repository} is there and public, and was to be private: nothing was uploaded; make it private in "
                f"its settings, or give another name; then: {again}"
            )
        api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Quantised by w8a8", delete_patterns=_STALE
        )
    except HubError:
        raise
    except (_NETWORK, OSError, ValueError, RuntimeError) as error:  # RuntimeError: hf_xet's
        first = str(error).strip().splitlines()[:1]
        raise HubError(
            f"{directory} could not be pushed to {repository} ({': '.join([type(error).__name__, *first])}); the "
            f"directory is whole, go on with: {again}"
        ) from error
    return str(address)

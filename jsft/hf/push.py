"""Uploads an exported model to the hub: only when asked to, and private unless asked otherwise."""

from pathlib import Path

from jsft.errors import ConfigError, ModelError


def check_push(repository: str, *, public: bool) -> None:
    """Refuses what an upload to `repository` (ORG/NAME) would refuse, before anything is written: a bad name, a missing
    or refused token, and a repository that is public although `public` was not asked for. Raises ConfigError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise HFValidationError
    except HFValidationError:
        raise ConfigError(f"--push {repository}: the hub's name of a model has the form ORG/NAME") from None
    api = HfApi()
    try:
        api.whoami()
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return  # it will be made
    except LocalTokenNotFoundError:
        raise ConfigError(f"--push {repository}: no token is here; set HF_TOKEN, or run: hf auth login") from None
    except Exception as error:  # the hub's own errors, and those of an HTTP library that changes with its version
        raise ConfigError(f"--push {repository}: {_reason(error)}") from error
    if not info.private and not public:
        raise ConfigError(
            f"--push {repository}: it exists and is public; give --public to show this model to everybody, or another "
            f"name"
        )


def push(folder: Path, repository: str, *, public: bool, message: str) -> str:
    """Uploads the files of `folder` in one commit; returns the address. Raises ModelError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:
        raise ModelError(
            f"{folder} is written, but was not uploaded to {repository}: {_reason(error)}; run the same command again"
        ) from error
    return str(commit.repo_url)


def _reason(error: Exception) -> str:
    """One line with what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub refuses the token; make a new one, set HF_TOKEN"
    if status == 403:
        return "the token may not write there (403); give it the right to write, or take another ORG"
    return " ".join(str(error).split())[:200] or type(error).__name__

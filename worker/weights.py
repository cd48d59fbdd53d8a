"""MODEL_NAME becomes a local snapshot folder: a folder given as such, the Hub's cache, or a download."""

import logging
from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from worker.config import Settings
from worker.errors import ConfigurationError, StartupError

log = logging.getLogger(__name__)

NOT_NEEDED = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "original/*", "*.md", ".gitattributes"]
"""Files of a repository that vLLM never loads where there are safetensors."""


def resolve(settings: Settings) -> Path:
    """Return the folder that holds the model, downloading it if need be.

    Raises:
        ConfigurationError: the name, the revision or the access is wrong.
        StartupError: the Hub cannot be reached and nothing is there locally.
    """
    name = settings.model_name
    if (folder := Path(name)).is_dir():
        return folder.resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigurationError(f"MODEL_NAME={name!r}: no such folder. Give a folder or a Hugging Face id (ORG/NAME).")
    return _snapshot(settings)


def _snapshot(settings: Settings) -> Path:
    name, revision = settings.model_name, settings.model_revision
    log.info("Looking for %s in the local cache and on the Hugging Face Hub", name)
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=settings.hf_token,
                cache_dir=settings.download_dir,
                ignore_patterns=NOT_NEEDED,
            )
        )
    except HFValidationError:
        raise ConfigurationError(f"MODEL_NAME={name!r}: neither a folder nor a Hugging Face id (ORG/NAME).") from None
    except GatedRepoError:
        raise ConfigurationError(
            f"MODEL_NAME={name!r} is gated: ask for access at https://huggingface.co/{name} and set HF_TOKEN "
            "to a token of an account that has it."
        ) from None
    except RepositoryNotFoundError:
        raise ConfigurationError(
            f"MODEL_NAME={name!r}: the Hugging Face Hub has no such model, or it is private. Check the spelling; "
            "for a private model set HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise ConfigurationError(f"MODEL_REVISION={revision!r}: {name} has no such branch, tag or commit.") from None
    except (OSError, httpx2.HTTPError) as error:
        raise StartupError(
            f"MODEL_NAME={name!r} is not in the local cache and could not be fetched from the Hugging Face Hub: "
            f"{type(error).__name__}. Check the network, or give a local folder."
        ) from error

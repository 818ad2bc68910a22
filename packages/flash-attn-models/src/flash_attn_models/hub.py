"""From a name to a local folder: a folder itself, or a repository of the Hugging Face hub, downloaded or cached."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.gpt.repositories import REPOSITORIES

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Of a repository that has both, weights in .bin files are not asked for.
_CONFIG = ["config.json", "generation_config.json"]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_BIN = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def find_folder(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder with config and weights.

    Args:
        name_or_folder: a local folder; a size of a family, such as "llama-3.2-1b"; or a repository on the Hugging Face
            hub, such as "openai-community/gpt2", of which config and weights are downloaded unless they are in
            huggingface_hub's cache: safetensors, or .bin files where there are none.
        revision: branch, tag or commit of the repository; None is its main branch.
        token: for repositories that need one; None is that of ``hf auth login`` or of HF_TOKEN.
        cache_dir: where downloads are kept; None is huggingface_hub's place (HF_HOME).
        local_files_only: take what is cached and don't connect; as with HF_HUB_OFFLINE=1.

    Raises:
        ValueError: a name that is neither, or a repository or revision that does not exist or holds no weights.
        OSError: a repository that one must ask for, no connection, or nothing cached.
    """
    name = os.fspath(name_or_folder)
    path = Path(name)
    options = {"revision": revision, "token": token, "cache_dir": cache_dir}
    if name and path.is_dir():
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise bad_argument(
                given[0],
                "a value beside a local folder",
                "None",
                "leave it out, or rename the folder if the repository is meant",
            )
        return path
    repository = REPOSITORIES.get(name, name)
    # Names without an owner are those of the hub's first repositories; one much like a size's is a slip.
    misspelt = "/" not in repository and did_you_mean(name, REPOSITORIES)
    if path.exists() or not _REPO_ID.fullmatch(repository) or misspelt:
        raise bad_argument(
            "name_or_folder",
            repr(name),
            f"a local folder, a repository 'owner/name' of the Hugging Face hub, or a known name"
            f"{did_you_mean(name, REPOSITORIES)}",
            "check the spelling, and that the folder exists",
        )
    return _snapshot(repository, {**options, "local_files_only": local_files_only})


def _snapshot(repository: str, options: dict[str, Any]) -> Path:
    folder = _download(repository, [*_CONFIG, *_SAFETENSORS], options)
    if not any(folder.glob("*.safetensors")):
        folder = _download(repository, [*_CONFIG, *_BIN], options)
    if not (folder / "config.json").is_file() or not _has_weights(folder):
        found = sorted(path.name for path in folder.iterdir())
        message = f"{', '.join(found) or 'neither config.json nor weights'}"
        if options["local_files_only"] or _is_offline():
            raise FileNotFoundError(
                f"{repository}: the cache holds {message}, and not all of the model. "
                "Fix: load it once with a connection (without local_files_only and HF_HUB_OFFLINE)."
            )
        raise bad_argument(
            "name_or_folder",
            f"{repository!r}, which holds {message}",
            "a repository with config.json and model.safetensors or pytorch_model.bin, or their shards",
            "use another repository of the model, or another revision",
        )
    return folder


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _download(repository: str, patterns: list[str], options: dict[str, Any]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision {options['revision']!r}" if options["revision"] else ""
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, **options))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repository}: a repository that one must ask for. Fix: accept its terms on "
            f"https://huggingface.co/{repository}, then run 'hf auth login' or give token=."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise bad_argument(
            "name_or_folder",
            repr(repository),
            "a repository that exists, and that your token may read",
            "check the spelling; for a private repository run 'hf auth login' or give token=",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise bad_argument(
            "revision",
            repr(options["revision"]),
            f"a branch, tag or commit of {repository}",
            "check it on the hub, or leave it out",
        ) from error
    except errors.HFValidationError as error:
        raise bad_argument(
            "name_or_folder", repr(repository), "a repository 'owner/name'", "check the spelling"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = (
            "not in the cache, and downloads are off (local_files_only, or HF_HUB_OFFLINE)"
            if options["local_files_only"] or _is_offline()
            else "neither in the cache nor can the hub be reached"
        )
        raise FileNotFoundError(
            f"{repository}{at}: {why}. Fix: load it once with a connection, or give the folder of a copy."
        ) from error

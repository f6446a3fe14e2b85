"""A model folder to a model hub, by huggingface_hub."""

import importlib
import logging
from pathlib import Path
from typing import Any

from uvc.io.files import one_line
from uvc.io.serialization import load

FILES = ["model.safetensors", "config.json", "README.md", "structure.*", "summary.json", "compact.json"]


def push_to_hub(folder: str | Path, repo: str, private: bool = False, **options: Any) -> str:
    """Upload the model that `save` or `uvc compress` left in `folder` to the repository "owner/name".

    The repository is made if need be. Of the folder go the model, its card and its figures: no checkpoint, no
    log. The model is loaded first, so that no damaged one is sent. options: of huggingface_hub's
    `upload_folder`, such as `commit_message` or `token`. Returns the address. ValueError, in one line, for a
    folder without a model, a missing package, or a hub that cannot be reached or refuses.
    """
    folder = Path(folder)
    load(folder)
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(
            "push_to_hub needs the package huggingface_hub; pip install huggingface_hub"
        ) from None
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # each try to reach it would be a line
    try:
        api = hub.HfApi(token=options.pop("token", None))
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), **{"allow_patterns": FILES, **options})
    except Exception as error:  # a client of a hub fails as the network does, in many ways
        raise ValueError(f"push_to_hub: {repo!r}: {one_line(error):.200}; the folder is unchanged") from None
    finally:
        logger.setLevel(level)
    return str(address)

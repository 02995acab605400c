"""`push_to_hub`: a sparse checkpoint with its card becomes a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from .card import check_sparse, write_card
from .carry import CARD
from .hub import is_id, reason
from .source import check_folder


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str = "Upload a sparse checkpoint",
) -> str:
    """Send a sparse checkpoint to the hub, with a card, which is written first where there is none.

    Args:
        folder: a checkpoint that `convert` or a sparse model's `save_pretrained` wrote.
        repo: the id of the repository ("owner/name"), which is made if it is missing.
        private: whether a repository that is made is private; by default as the owner's settings say.
        revision: the branch; by default the main one.
        token: what allows to write; by default the one that `hf auth login` stored.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: no checkpoint in the folder.
        ValueError: no id, or the checkpoint is not sparse, or is damaged.
        PermissionError: the hub refuses it.

    Examples:
        >>> push_to_hub("llama-sparse", "me/llama-sparse")  # doctest: +SKIP
        'https://huggingface.co/me/llama-sparse/commit/...'
    """
    if not is_id(repo):
        raise ValueError(f"{repo!r} is no hub id; give owner/name")
    folder = Path(folder)
    check_folder(folder)
    if (folder / CARD).exists():
        check_sparse(folder)
    else:
        write_card(folder, address=repo)
    api = HfApi(token=token)
    try:
        # without an owner the hub adds that of the token
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message, ignore_patterns=[".*"]
        )
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise PermissionError(f"{folder} could not be sent to {repo}: {reason(error)}") from error
    return done.commit_url

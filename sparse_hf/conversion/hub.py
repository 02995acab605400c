"""The hub: ids of repositories, and what is fetched of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .carry import FOREIGN_FOLDERS, MODULES, WEIGHTS, module_names, read_json

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
# forms of weights, a list of shards or one file each; where there are several, the first is taken
FORMS = ((SAFETENSORS_INDEX, SAFETENSORS), ("pytorch_model.bin.index.json", "pytorch_model.bin"))


@dataclass(frozen=True)
class Place:
    """Where in a repository a checkpoint is, and who asks for it, as `from_pretrained` is told.

    Args:
        revision: a branch, a tag or a commit; by default the main branch.
        subfolder: the folder of the checkpoint in the repository.
        token: what gives access to a private or gated repository; by default the one that `hf auth login` stored.
    """

    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = field(default=None, repr=False)


HERE = Place()


def is_id(text: str) -> bool:
    """Could this be the id of a repository, "owner/name" or "name"?"""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def fetch(repo: str, place: Place = HERE) -> Path:
    """Download what conversion reads of a repository: one form of the weights, and what travels with them.

    Weights for other libraries and in other forms stay where they are. What was downloaded before is taken from
    huggingface_hub's cache, also where the hub cannot be reached.

    Returns:
        The folder of the checkpoint in the cache.

    Raises:
        FileNotFoundError: no such repository, revision or folder, or none that can be reached with this token.
    """
    # patterns of huggingface_hub go across folders
    others = [word for word in WEIGHTS if word != "*.index.json"]
    others += [text for name in FOREIGN_FOLDERS for text in (f"{name}/*", f"*/{name}/*")]
    below = f"{place.subfolder}/" if place.subfolder else ""
    folder = _download(repo, place, [f"{below}*"], others) / place.subfolder
    if not folder.is_dir():
        raise FileNotFoundError(f"{repo} has no folder {place.subfolder}")
    for module in ("", *(f"{name}/" for name in module_names(folder / MODULES))):
        for index, single in FORMS:
            listed = folder / module / index
            names = sorted(set(read_json(listed).get("weight_map", {}).values())) if listed.is_file() else [single]
            # a pattern that nothing fits would be warned of
            _download(repo, place, [f"{below}config.json", *(f"{below}{module}{name}" for name in names)], [])
            if any((folder / module / name).is_file() for name in names):
                break
    return folder


def _download(repo: str, place: Place, wanted: list[str], unwanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = snapshot_download(
            repo, revision=place.revision, token=place.token, allow_patterns=wanted, ignore_patterns=unwanted
        )
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repo} is no local folder and could not be fetched from the hub: {reason(error)}"
        ) from error
    return Path(found)


def reason(error: Exception) -> str:
    """What an answer of the hub says, in one line: its status, and the sentence behind it."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join([line for line in lines if line and not line.startswith("For more information")][:2])

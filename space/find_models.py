"""Where the exported models are: in model/ beside the app, or in the repository of the hub that models.json pins.

A Space's own repository is no place for weights (the hub bounds it); a published Space takes them from the model
repository, at one commit. There they are downloaded before the app starts (`preload_from_hub` in the Space's card).
"""

import json
from pathlib import Path

BESIDE = Path(__file__).with_name("model")
PINNED = Path(__file__).with_name("models.json")
INSIDE = "onnx"  # the folder of the model repository that holds them


def find_models() -> Path:
    """The folder of exported models; downloads it where it is pinned and not in the hub's cache yet.

    Raises FileNotFoundError, in one line, when it cannot be had.
    """
    if not PINNED.is_file():
        return BESIDE
    from huggingface_hub import snapshot_download

    pin = json.loads(PINNED.read_text(encoding="utf-8"))
    repository, revision = pin["repository"], pin["revision"]
    try:
        snapshot = snapshot_download(repository, revision=revision, allow_patterns=f"{INSIDE}/*")
    except Exception as error:  # the network, the hub or the disk: all have errors of their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(f"{repository} at {revision} cannot be had from the hub ({reason})") from None
    return Path(snapshot) / INSIDE

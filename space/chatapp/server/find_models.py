"""Find the exported models: in model/ beside the app, or in the hub's repository that models.json pins.

The hub bounds the size of a Space's own repository. A published Space therefore takes its models from the model
repository, at one commit; the hub downloads them before the app starts (`preload_from_hub` in the Space's card).
"""

import json
from pathlib import Path

from huggingface_hub import snapshot_download

INSIDE = "onnx"  # the models' folder in the model repository


def find_models(app: Path) -> Path:
    """The folder of exported models for the app in folder `app`. Pinned models are downloaded if need be.

    Raises FileNotFoundError, with one line, when the download fails.
    """
    pinned = app / "models.json"
    if not pinned.is_file():
        return app / "model"
    pin = json.loads(pinned.read_text(encoding="utf-8"))
    repository, revision = pin["repository"], pin["revision"]
    try:
        snapshot = snapshot_download(repository, revision=revision, allow_patterns=f"{INSIDE}/*")
    except Exception as error:  # network, hub and disk raise errors of their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"{repository} at {revision} cannot be downloaded from the hub ({reason}). "
            "Check the network, and that the repository is there and public; then start the app again"
        ) from None
    return Path(snapshot) / INSIDE

"""Serve the chat app in this process: `make serve PORT=7860`. Other options are those of space/app.py."""

import os
import sys

from commands.commit import UNKNOWN, project_commit


def main() -> None:
    # The app replaces this process, so that stopping this process stops the app.
    commit = project_commit().replace(UNKNOWN, "")
    made = ["--models", "models/onnx", "--evaluation", "reports/evaluation.json"]
    app = [sys.executable, "space/app.py", *made, "--commit", commit, *sys.argv[1:]]
    os.execv(sys.executable, app)

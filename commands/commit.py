"""The project's commit, as a Space and the chat page name it."""

import subprocess

UNKNOWN = "unknown"


def project_commit() -> str:
    """The full hash of git's last commit; `-dirty` where files were changed since, `unknown` without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or UNKNOWN
    except FileNotFoundError:
        return UNKNOWN

"""List the stages that would run, and print the last summary. A wrong parameter is reported first, and alone.

Reads what DVC and the summary read; writes nothing. Run: `make status`
"""

import subprocess
import sys

from commands import summary
from stages.common.params import read_params

UP_TO_DATE = "up to date"  # in what DVC says when no stage would run


def main() -> None:
    read_params()
    result = subprocess.run([sys.executable, "-m", "dvc", "status"], stdout=subprocess.PIPE, text=True)
    print(result.stdout, end="")
    if result.returncode:
        sys.exit(result.returncode)
    if UP_TO_DATE not in result.stdout:
        print("\nThe stages after these run again, too, where their inputs change. What follows is of the runs before.")
    summary.main()

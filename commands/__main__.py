"""Run one command: `python -m commands NAME`, as the Makefile does."""

from stages.common.entry import run_named

# Each command, and whether it may reach the network. (repro and verify run stages, which decide for themselves.)
COMMANDS = {
    "check": False,
    "plan": True,
    "recipe": False,
    "repro": True,
    "summary": False,
    "status": False,
    "verify": True,
    "space": False,
    "deploy": True,
    "serve": False,
    "docs": False,
}

if __name__ == "__main__":
    run_named("commands", COMMANDS, lock=False)

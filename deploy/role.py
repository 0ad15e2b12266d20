"""Runs one role, and imports only what it needs: `python -m deploy.role worker scoring [--health-port N]`.

The local supervisor starts nine of these at once, so start-up time is CPU of the whole machine. The
command line's `gateway`, `ingress`, `worker` and `sink` call the same function. Signals are listened to before
anything large is imported: a process that is told to end while it starts ends with code 0 too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from contracts.topology import STAGES

SINKS = ("audit", "metrics", "parking")


def run(role: str, which: str | None, health_port: int | None) -> None:
    """Run a role until SIGTERM or SIGINT. Raises what its start raised."""
    from deploy import logs, settings, stopping

    stopping.end_at_once()
    import uvloop

    from deploy import wiring

    loaded = settings.load()
    if health_port is not None:
        loaded = loaded.model_copy(update={"health_port": health_port})
    name = role if which is None else f"{role}-{which}"
    logs.configure(loaded.log_level, name)
    uvloop.run(stopping.left_when_failed(stopping.until_told(wiring.role(loaded, role, which))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes as of the command line: 0 stopped, 1 failed, 2 wrong settings, 3 a server is not reachable."""
    from deploy.stopping import end_at_once

    end_at_once()
    parser = argparse.ArgumentParser(prog="python -m deploy.role", description="Run one role of the fleet.")
    parser.add_argument("role", choices=("gateway", "ingress", "control", "autoscaler", "worker", "sink"))
    parser.add_argument("which", nargs="?", choices=(*map(str, STAGES), *SINKS))
    parser.add_argument("--health-port", type=int)
    given = parser.parse_args(arguments)
    from contracts.failures import InfrastructureError, RiskfleetError
    from deploy import settings

    try:
        run(given.role, given.which, given.health_port)
    except settings.SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except InfrastructureError as error:
        sys.stderr.write(f"not reachable: {error}\n")
        return 3
    except RiskfleetError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

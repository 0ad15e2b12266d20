"""The upstream clients of `examples/` do what their first lines say, against a running fleet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contracts.events import event_id_of
from tests.integration.fleet_fixture import RunningFleet, show

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(fleet: RunningFleet, *command: str, cwd: Path | None = None) -> str:
    """The output of a client that was given nothing but its environment."""
    made = fleet.upstreams["acme"]
    given = {"GATEWAY": fleet.url, "API_KEY": made.api_key, "TENANT": made.tenant, "AMQP_URL": fleet.amqp_url("acme")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RISKFLEET_")}
    done = subprocess.run(command, env=kept | given, cwd=cwd, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
    return done.stdout


def decided(fleet: RunningFleet, identity: str) -> str:
    return event_id_of(fleet.scope("acme"), identity)


def test_curl_submits_and_waits(fleet: RunningFleet) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: the shell example was not run")
    found = run(fleet, "sh", str(EXAMPLES / "submit.sh"), "example-curl")
    assert decided(fleet, "example-curl") in found
    assert '"outcome":' in found


def test_python_submits_over_http(fleet: RunningFleet) -> None:
    found = run(fleet, sys.executable, str(EXAMPLES / "submit_http.py"), "example-http").split()
    assert found[0] == decided(fleet, "example-http")
    assert found[1] in ("APPROVED", "REQUIRE_APPROVAL", "REJECTED")


def test_python_submits_over_amqp(fleet: RunningFleet) -> None:
    found = run(fleet, sys.executable, str(EXAMPLES / "submit_amqp.py"), "example-amqp").split()
    assert found[0] == decided(fleet, "example-amqp")
    assert found[1] in ("APPROVED", "REQUIRE_APPROVAL", "REJECTED")


def test_node_submits_over_amqp(fleet: RunningFleet, tmp_path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node or npm is not installed: the Node example was not run")
    shutil.copy(EXAMPLES / "submit_amqp.js", tmp_path)
    installed = subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", "amqplib@2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if installed.returncode != 0:
        show(installed.stderr)
        pytest.skip("npm could not install amqplib (no package registry?): the Node example was not run")
    found = run(fleet, node, "submit_amqp.js", "example-node", cwd=tmp_path).split()
    assert found[0] == decided(fleet, "example-node")
    assert found[1] in ("APPROVED", "REQUIRE_APPROVAL", "REJECTED")

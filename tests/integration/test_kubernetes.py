"""
Kubernetes: what the examples' deployment says about a stop agrees with what the server does.

There is no cluster: the test does what a kubelet would do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.conftest import WARNINGS_ARE_ERRORS
from tests.integration import examples
from tests.integration.stopping import longest_stop

# On Linux, all of 127.0.0.0/8 is this machine; so a pod can have an address of its own.
POD = f"127.{1 + os.getpid() // 250 % 250}.{1 + os.getpid() % 250}.1"

# How long the interpreter may take to exit.
EXIT = 1.0


def resources() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all(examples.file("deployment.yaml"))}


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = resources()["Deployment"]["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    described: dict[str, Any] = only
    return described


def command() -> list[str]:
    """Return the command of the container, with the address of the pod."""
    ((name, source),) = [(each["name"], each["valueFrom"]) for each in container()["env"]]
    assert source == {"fieldRef": {"fieldPath": "status.podIP"}}
    return [each.replace(f"$({name})", POD) for each in container()["command"]]


def probe() -> tuple[str, int]:
    """Return the path and the port of the readiness probe."""
    asked = container()["readinessProbe"]["httpGet"]
    (port,) = [each["containerPort"] for each in container()["ports"] if each["name"] == asked["port"]]
    return asked["path"], port


def drain() -> float:
    return float(command()[command().index("--drain-delay") + 1])


def get(path: str, port: int) -> int:
    """Send a request on a new connection, as the kubelet does; return the status."""
    connection = HTTPConnection(POD, port, timeout=container()["readinessProbe"]["timeoutSeconds"])
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def running(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the container's command, until it is ready."""
    (directory / "app.py").write_text(examples.file("app.py"))
    _python, *arguments = command()
    with (
        (directory / "log").open("w") as log,
        subprocess.Popen(  # noqa: S603
            [sys.executable, *WARNINGS_ARE_ERRORS, *arguments],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"http://{POD}:{probe()[1]}\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["Deployment", "Service"])
def test_resources_of_the_examples_are_valid_for_kubernetes(kind: str) -> None:
    """By Kubernetes' own schemas, strictly."""
    newest = kubernetes_validate.latest_version()
    kubernetes_validate.validate(resources()[kind], newest, strict=True)


def test_service_of_the_examples_selects_its_pods() -> None:
    """By their labels, and by the name of their port."""
    template = resources()["Deployment"]["spec"]["template"]
    service = resources()["Service"]["spec"]
    assert service["selector"] == template["metadata"]["labels"]
    assert service["selector"] == resources()["Deployment"]["spec"]["selector"]["matchLabels"]
    assert [each["targetPort"] for each in service["ports"]] == [each["name"] for each in container()["ports"]]


def test_times_of_the_deployment_agree_with_each_other() -> None:
    """The drain is longer than a probe needs to fail, and the grace period longer than a stop can take."""
    asked = container()["readinessProbe"]
    unready = asked["periodSeconds"] * asked["failureThreshold"] + asked["timeoutSeconds"]
    assert unready == 3  # as the page says
    assert unready < drain()
    assert command()[:3] == ["python", "-m", "aioserve"]
    longest = longest_stop(command()[3:])
    assert longest + EXIT <= pod()["terminationGracePeriodSeconds"]
    *parts, total, limit = examples.sums("in `deployment.yaml`")
    assert (total, limit) == (longest, pod()["terminationGracePeriodSeconds"])
    assert sum(parts) == total


def test_sum_of_the_times_on_the_page_is_that_of_the_defaults() -> None:
    *parts, total = examples.sums("default")
    assert sum(parts) == total == longest_stop(["app:app"])


def test_pod_that_is_terminated_answers_until_its_drain_is_over(tmp_path: Path) -> None:
    """From then on every readiness probe fails, and requests are still answered; then the process ends."""
    path, port = probe()
    with running(tmp_path) as process:
        assert get(path, port) == 200
        asked = time.monotonic()
        process.terminate()
        while get(path, port) == 200:  # the signal is on its way
            pass
        failed = 0
        try:
            while True:
                assert get("/", port) == 200
                assert get(path, port) == 503
                failed += 1
        except (ConnectionRefusedError, TimeoutError):
            # The kernel drops a connection that begins while the listener closes. It is tried again after a second,
            # which is how long the probe waits.
            accepted = time.monotonic() - asked
        assert process.wait() == 0
        took = time.monotonic() - asked
    assert failed > container()["readinessProbe"]["failureThreshold"]
    assert drain() <= accepted <= took < pod()["terminationGracePeriodSeconds"]

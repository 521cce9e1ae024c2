"""
`serving_process()`: the parent is killed, forks, or gets Ctrl+C from the terminal.
"""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from tests.helpers.forking import ALLOWED
from tests.helpers.processes import TALKING, is_free, linux_only
from tests.helpers.programs import Program

pytestmark = linux_only

PARENT = """
import asyncio, os, signal, sys, time
from aioserve import _limits, serving_process
from tests.conftest import LOOPS

async def main(app, moment):
    if moment == "blocked":  # so that the child is given up soon
        _limits.CANCELLED_HANDLERS = _limits.LIFESPAN_GRACE = 0.05
    async with serving_process(app, shutdown_timeout=0.5) as server:
        print("ready", server.pid, server.port, flush=True)
        if moment == "stopping":
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(b"GET /stream HTTP/1.1\\r\\nhost: test\\r\\n\\r\\n")
            await reader.readuntil(b"data: 0")
            print("streaming", flush=True)
        elif moment == "blocked":
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(b"GET /block HTTP/1.1\\r\\nhost: test\\r\\n\\r\\n")
            await asyncio.Event().wait()
        else:
            try:
                await asyncio.Event().wait()
            finally:
                print("the body unwinds, and the child has ended with", server.returncode, flush=True)

app, moment, loop = sys.argv[1:]
with asyncio.Runner(**LOOPS[loop]) as runner:
    runner.run(main(app, moment))
"""


def parent(app: str, moment: str, loop: str) -> Program:
    return Program("-c", PARENT, app, moment, loop)


def child_of(program: Program) -> int:
    return int(Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children").read_text())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("app", "moment", "said"),
    [
        ("tests.helpers.blocking_module:app", "importing", "importing"),
        ("tests.helpers.children:hanging", "starting", "starting"),
        (TALKING, "serving", "ready"),
        (TALKING, "stopping", "streaming"),
        (TALKING, "blocked", "blocking"),
    ],
    ids=lambda value: value if value.isalpha() else "",
)
def test_child_ends_when_its_parent_is_killed(app: str, moment: str, said: str, loop: str) -> None:
    """Whatever it is doing; and the port is free."""
    with parent(app, moment, loop) as program:
        program.wait_for(said)
        end = os.pidfd_open(child_of(program))
        port = port_of(program)
        program.send(signal.SIGKILL)
        program.process.wait()
        assert select.select([end], [], [], 30)[0]
        os.close(end)
    assert port is None or is_free(port)


def port_of(program: Program) -> int | None:
    ready = [line for line in program.said if line.startswith("ready")]
    return int(ready[0].split()[2]) if ready else None


def test_child_ends_when_its_parent_is_killed_at_once() -> None:
    """Before the child has printed anything."""
    with parent(TALKING, "serving", "asyncio") as program:
        children = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children")
        while not children.read_text():
            pass
        end = os.pidfd_open(child_of(program))
        program.send(signal.SIGKILL)
        program.process.wait()
        assert select.select([end], [], [], 30)[0]
        os.close(end)


def test_child_ends_when_its_parent_is_killed_and_a_fork_of_the_parent_lives_on() -> None:
    """Although the fork has inherited the parent's end of the pipe that the child watches."""
    forking = PARENT.replace('print("ready"', 'os.fork() or signal.pause(); print("ready"')
    with Program(*ALLOWED, "-c", forking, TALKING, "serving", "asyncio") as program:
        child = int(program.wait_for("ready").split()[1])
        end = os.pidfd_open(child)
        program.send(signal.SIGKILL)
        program.process.wait()
        assert select.select([end], [], [], 30)[0]
        os.close(end)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_ctrl_c_reaches_the_child_through_its_parent_only(loop: str) -> None:
    """The terminal sends it to the whole group; the body unwinds while the child still serves."""
    with parent(TALKING, "serving", loop) as program:
        program.wait_for("ready")
        os.killpg(program.process.pid, signal.SIGINT)
        code, err = program.end()
    assert code == -signal.SIGINT
    assert err.endswith("KeyboardInterrupt\n")
    assert program.said[-2:] == ["the body unwinds, and the child has ended with None", "lifespan over"]

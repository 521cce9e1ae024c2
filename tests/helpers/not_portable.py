"""
Why a test does not hold on a loop without `add_reader()`, as marks; docs/explanation/loops.md says what
happens there instead.
"""

from __future__ import annotations

import pytest

unix_sockets = pytest.mark.not_portable("Windows has no Unix sockets")
systemd = pytest.mark.not_portable("Windows has no systemd")
forks = pytest.mark.not_portable("Windows has no fork()")
child_processes = pytest.mark.not_portable("serving_process() needs a loop with add_reader()")
loops_signals = pytest.mark.not_portable("such a loop has no add_signal_handler()")
loop_accepts = pytest.mark.not_portable("the loop accepts by itself, without a task and without a call of ours")
lent_twice = pytest.mark.not_portable("Windows leaves a socket with the first event loop that accepts on it")
unread = pytest.mark.not_portable("nobody knows what has arrived and is not read yet")
resets = pytest.mark.not_portable("the loop closes both directions: a client that is still sending may get a reset")

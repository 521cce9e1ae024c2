"""
A module that swallows the first thing that is raised during its import.
"""

import time


def block() -> None:
    for _ in range(6000):
        time.sleep(0.01)  # not signal.pause(): a signal that comes just before it would not end it


try:
    print("importing", flush=True)
    block()
except BaseException:  # noqa: BLE001
    print("swallowed", flush=True)
block()
print("imported", flush=True)

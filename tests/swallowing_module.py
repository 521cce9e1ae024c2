"""
A module that takes whatever is raised in it for its own affair.
"""

import signal

print("importing", flush=True)
try:
    signal.pause()
except BaseException:  # noqa: BLE001
    print("swallowed", flush=True)
signal.pause()
print("imported", flush=True)

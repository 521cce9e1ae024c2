"""
A module that swallows whatever is raised during its import.
"""

import signal

print("importing", flush=True)
try:
    signal.pause()
except BaseException:  # noqa: BLE001
    print("swallowed", flush=True)
signal.pause()
print("imported", flush=True)

"""
A module whose import blocks until the handler of a signal raises something.
"""

import time

print("importing", flush=True)
for _ in range(6000):
    time.sleep(0.01)  # not signal.pause(): a signal that comes just before it would not end it
print("imported", flush=True)

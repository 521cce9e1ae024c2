"""
A module whose import blocks until a signal comes.
"""

import signal

print("importing", flush=True)
signal.pause()
print("imported", flush=True)

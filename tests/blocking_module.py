"""
A module whose import takes as long as somebody lets it.
"""

import signal

print("importing", flush=True)
signal.pause()
print("imported", flush=True)

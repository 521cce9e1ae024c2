"""
What the benchmarks share: the peers, the clients, other interpreters, and how to measure in turn and print.
"""

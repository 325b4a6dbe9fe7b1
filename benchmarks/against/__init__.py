"""Comparisons of speed and memory with other programs; `benchmarks/peers.py` is the command."""

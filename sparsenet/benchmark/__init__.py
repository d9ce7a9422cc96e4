"""Benchmarks: contenders timed in turns, goals beside the figures, results as JSON. See docs/benchmarks.md.

``timing`` measures; ``cases`` says what; ``rivals``, ``linear``, ``operations``, ``networks``, ``training`` and
``memory`` are the contenders; ``goals`` what they should reach; ``results`` and ``plot`` show it.
"""

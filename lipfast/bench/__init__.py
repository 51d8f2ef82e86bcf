"""Benchmarks: each times lipfast against torch in one run, checks its own answer, and says where the ceiling is.

A family is a module with ``cases(size)`` (see `lipfast.bench.harness.Case`); `lipfast.bench.families` lists them.
"""

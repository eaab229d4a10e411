"""Benchmarks: `python -m tests.bench` on CPUs, `python -m tests.bench.gpu` on a GPU."""

import os

# torch's profiler, which counts memory here, reports every start and stop of itself otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

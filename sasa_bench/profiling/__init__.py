"""Readers of profiler traces: operators, stacks, memory and the page that shows them; no torch."""

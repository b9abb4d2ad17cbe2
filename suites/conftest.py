"""`pytest suites/` measures each case and implementation as one benchmark; see sasa_bench/pytest_plugin.py."""

from sasa_bench.pytest_plugin import pytest_addoption, pytest_collect_file

__all__ = ["pytest_addoption", "pytest_collect_file"]

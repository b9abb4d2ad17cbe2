"""Threads of test processes sleep while they wait: several of them share a few cores."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

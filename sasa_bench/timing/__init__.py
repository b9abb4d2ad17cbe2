"""Check, then time: one case in a child process of its own."""

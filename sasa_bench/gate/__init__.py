"""The regression gate: base and head in interleaved pairs, a verdict for each case, an exit status."""

"""Readers of results files: tables, charts, sentences and pages; no torch."""

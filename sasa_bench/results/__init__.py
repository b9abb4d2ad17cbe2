"""The results file: rows, columns, machines, statistics and formats; no torch and no pandas."""

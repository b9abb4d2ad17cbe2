"""The loop of a run: which rows are missing, who measures them, and where they are written."""

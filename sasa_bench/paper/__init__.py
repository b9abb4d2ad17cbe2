"""The paper's tables next to the figures computed and measured here."""

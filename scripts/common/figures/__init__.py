"""What is drawn in scripts/results, in one style. Needs matplotlib: import it where you draw."""

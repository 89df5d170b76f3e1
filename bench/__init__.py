"""Figures, as ratios and bars, side by side in one run. Never a test: a slow machine fails nothing."""

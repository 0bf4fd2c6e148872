"""Scores of latents: their questions, formulas and controls, and means over latents with intervals."""

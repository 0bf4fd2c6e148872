"""Scores of latents: questions, formulas, controls, and means with intervals."""

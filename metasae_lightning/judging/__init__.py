"""Automatic interpretation: explanations of latents, and scores of how well judges tell by them where a latent fires."""

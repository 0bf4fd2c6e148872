"""Automatic interpretation: explanations of latents, and scores of how well a judge can tell from them where a latent fires."""

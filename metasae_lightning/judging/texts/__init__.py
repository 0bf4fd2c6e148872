"""The texts that latents are judged by: contexts drawn from collected codes, samples of latents, and planted latents."""

"""The server of `metasae serve`: its page shows where latents fire on a typed text, and how a latent changes the continuation."""

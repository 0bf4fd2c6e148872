"""The page of `metasae serve`: where latents fire on a typed text, and what one of them does to its continuation."""

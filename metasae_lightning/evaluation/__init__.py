"""SAEs measured and compared on held-out text."""

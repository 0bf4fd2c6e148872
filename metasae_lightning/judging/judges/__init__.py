"""Judges, which answer questions about texts: a server's model, a local model, a sentence embedder; and the ledger of their answers."""

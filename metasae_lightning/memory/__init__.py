"""The memory that a run will take, measured before anything is loaded."""

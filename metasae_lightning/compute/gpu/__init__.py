"""The GPU's forms of the sparse computations: shapes that do not depend on the data, and one kernel for each pass."""

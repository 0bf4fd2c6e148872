"""The GPU's forms of the sparse computations: shapes that do not depend on the data, one kernel for one pass."""

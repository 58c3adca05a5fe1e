"""Which blocks of a Molmo can be left out: importance scores, a search over sets, and their comparison."""

"""What "the same" means, as code: bit for bit, or within the error budget.

The rule, from the design, for a product in given dtypes: an engine may err, against an fp64 oracle built from the
dequantised weight, by at most twice what the reference errs there, plus one unit in the last place of the output.
"""

from .budget import Budget, assert_same_bits, assert_within_budget, error_budget, oracle, ulp

__all__ = ["Budget", "assert_same_bits", "assert_within_budget", "error_budget", "oracle", "ulp"]

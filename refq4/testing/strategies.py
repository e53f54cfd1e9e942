"""Cases as a hypothesis strategy: hypothesis draws them, and shrinks one that fails.

@given(cases("gemm_4bit"))
def test_mine(case):
    assert check(case, "mine").status == "same"
"""

from __future__ import annotations

from hypothesis import strategies as st

from .cases import ACTIVATIONS, BLOCKSIZES, CODES, DTYPES, STORAGES, WEIGHTS, Case, normal

__all__ = ["cases"]


def cases(check: str, largest: int = 200) -> st.SearchStrategy[Case]:
    """Cases of one check, of sizes up to ``largest``; shrinks towards ``Case(check, m=1, n=1, k=1)``.

    Example:
        >>> from hypothesis import find
        >>> find(cases("gemv_4bit"), lambda case: case.k > 40 and case.bias)
        Case('gemv_4bit', k=41, blocksize=32, bias=True, weights='ramp', activations='ones')
    """
    sizes = st.integers(1, largest)
    return st.builds(
        Case,
        st.just(check),
        m=st.integers(1, 20),
        n=sizes,
        k=sizes,
        dtype=st.sampled_from(DTYPES),
        code=st.sampled_from(CODES),
        blocksize=st.sampled_from(BLOCKSIZES),
        nested=st.booleans(),
        bias=st.booleans(),
        storage=st.sampled_from(STORAGES),
        weights=st.sampled_from(("ramp", *(w for w in WEIGHTS if w != "ramp"))),
        activations=st.sampled_from(("ones", *(a for a in ACTIVATIONS if a != "ones"))),
        seed=st.integers(0, 99),
    ).map(normal)

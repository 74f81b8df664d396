"""Operators: exact sparse encoding, pools, gather decoding, token statistics.

Every operator has a plain torch form that runs anywhere and, where the package was compiled, a
native one with the same contract; ``impl`` chooses.
"""

from saelens_certify.ops._library import Impl
from saelens_certify.ops.codes import SparseCodes
from saelens_certify.ops.decode import decode, decode_permuted, decode_permuted_stats
from saelens_certify.ops.encode import threshold_encode, topk_encode
from saelens_certify.ops.head import head_pair_stats, head_stats
from saelens_certify.ops.margin import weight_norms
from saelens_certify.ops.pool import count_outside, pool_bits, pool_count_, restrict
from saelens_certify.ops.screen import Screen, prepare_screen
from saelens_certify.ops.statistics import PairStats, TokenStats, pair_stats, token_stats

__all__ = [
    "Impl",
    "PairStats",
    "Screen",
    "SparseCodes",
    "TokenStats",
    "count_outside",
    "decode",
    "decode_permuted",
    "decode_permuted_stats",
    "head_pair_stats",
    "head_stats",
    "pair_stats",
    "pool_bits",
    "pool_count_",
    "prepare_screen",
    "restrict",
    "threshold_encode",
    "token_stats",
    "topk_encode",
    "weight_norms",
]

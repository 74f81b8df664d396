"""Every operator in plain torch: the same contract on any device, no compiler needed."""

from saelens_certify.ops.reference.decode import decode, decode_permuted, decode_permuted_stats
from saelens_certify.ops.reference.encode import threshold_encode, topk_encode
from saelens_certify.ops.reference.head import head_pair_stats, head_stats
from saelens_certify.ops.reference.pool import count_outside, pool_count_, restrict
from saelens_certify.ops.reference.sae_lens import threshold_as_sae_lens, topk_as_sae_lens
from saelens_certify.ops.reference.statistics import pair_stats, token_stats

__all__ = [
    "count_outside",
    "decode",
    "decode_permuted",
    "decode_permuted_stats",
    "head_pair_stats",
    "head_stats",
    "pair_stats",
    "pool_count_",
    "restrict",
    "threshold_as_sae_lens",
    "threshold_encode",
    "token_stats",
    "topk_as_sae_lens",
    "topk_encode",
]

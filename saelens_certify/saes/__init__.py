"""SAEs in the form the engine needs: adapters, coding rules, checks and loading."""

from saelens_certify.saes.adapter import Codes, SAEAdapter
from saelens_certify.saes.architectures import adapt
from saelens_certify.saes.coding import Coding
from saelens_certify.saes.fused import FusedAdapter
from saelens_certify.saes.normalize import TokenMap
from saelens_certify.saes.sources import SAESpec, matching
from saelens_certify.saes.sparsify import load_sparsify

__all__ = [
    "Codes",
    "Coding",
    "FusedAdapter",
    "SAEAdapter",
    "SAESpec",
    "TokenMap",
    "adapt",
    "load_sparsify",
    "matching",
]

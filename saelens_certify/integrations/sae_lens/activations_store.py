"""Documents of a SAELens `ActivationsStore`: the names that belong to SAELens's users, in one place."""

from saelens_certify.data.stores import KIND, documents_of_store, is_store
from saelens_certify.store_draws import (
    N_CALIBRATION,
    N_EVALUATION,
    draw,
    resolve_stores,
    sequences_of_store,
)

__all__ = [
    "KIND",
    "N_CALIBRATION",
    "N_EVALUATION",
    "documents_of_store",
    "draw",
    "is_store",
    "resolve_stores",
    "sequences_of_store",
]

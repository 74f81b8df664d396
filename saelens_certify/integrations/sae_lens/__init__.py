"""Certificates where SAELens users work: evaluations, training runs, activation stores.

Names are imported when they are first used, so that `certify` can look at stores without SAELens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saelens_certify.integrations.sae_lens.activations_store import (
        documents_of_store,
        is_store,
        resolve_stores,
        sequences_of_store,
    )
    from saelens_certify.integrations.sae_lens.certificates import Certificates
    from saelens_certify.integrations.sae_lens.evals import run_evals
    from saelens_certify.integrations.sae_lens.history import History, Record
    from saelens_certify.integrations.sae_lens.inference import inference_form
    from saelens_certify.integrations.sae_lens.registration import (
        Registration,
        register,
        unregister,
    )
    from saelens_certify.integrations.sae_lens.training import CertifyingEvaluator

__all__ = [
    "Certificates",
    "CertifyingEvaluator",
    "History",
    "Record",
    "Registration",
    "documents_of_store",
    "inference_form",
    "is_store",
    "register",
    "resolve_stores",
    "run_evals",
    "sequences_of_store",
    "unregister",
]

_HOMES = {
    "Certificates": "certificates",
    "CertifyingEvaluator": "training",
    "History": "history",
    "Record": "history",
    "Registration": "registration",
    "documents_of_store": "activations_store",
    "inference_form": "inference",
    "is_store": "activations_store",
    "register": "registration",
    "resolve_stores": "activations_store",
    "run_evals": "evals",
    "sequences_of_store": "activations_store",
    "unregister": "registration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

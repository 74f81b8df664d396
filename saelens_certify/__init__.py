"""Faithfulness certificates for sparse autoencoders, for SAELens and TransformerLens.

Names are imported when they are first used: the operators (`saelens_certify.ops`) then need torch
only, and neither SAELens nor TransformerLens nor datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# A function named like its module must be imported here: the module's import would hide it later.
from saelens_certify.build_info import build_info
from saelens_certify.errors import CertifyError, EvidenceError
from saelens_certify.version import __version__

if TYPE_CHECKING:
    from saelens_certify import bounds, experiments, ops, saes
    from saelens_certify.certificate import Certificate
    from saelens_certify.certification import certify
    from saelens_certify.comparison import Comparison, compare
    from saelens_certify.config import CertifyConfig
    from saelens_certify.config_check import check_config, check_configs
    from saelens_certify.data import Sequences, as_sequences, split
    from saelens_certify.integrations.sae_lens import (
        CertifyingEvaluator,
        register,
        run_evals,
        unregister,
    )
    from saelens_certify.integrations.transformer_lens import proxy_hooks
    from saelens_certify.monitor import Monitor
    from saelens_certify.study import Setting, View, certify_many
    from saelens_certify.verification import Verification, verify

__all__ = [
    "Certificate",
    "CertifyConfig",
    "CertifyError",
    "CertifyingEvaluator",
    "Comparison",
    "EvidenceError",
    "Monitor",
    "Sequences",
    "Setting",
    "Verification",
    "View",
    "__version__",
    "as_sequences",
    "bounds",
    "build_info",
    "certify",
    "certify_many",
    "check_config",
    "check_configs",
    "compare",
    "experiments",
    "ops",
    "proxy_hooks",
    "register",
    "run_evals",
    "saes",
    "split",
    "unregister",
    "verify",
]

_MODULES = ("bounds", "experiments", "ops", "saes")
_HOMES = {
    "Certificate": "certificate",
    "CertifyConfig": "config",
    "CertifyingEvaluator": "integrations.sae_lens",
    "Comparison": "comparison",
    "Monitor": "monitor",
    "Sequences": "data",
    "Setting": "study",
    "Verification": "verification",
    "View": "study",
    "as_sequences": "data",
    "certify": "certification",
    "certify_many": "study",
    "check_config": "config_check",
    "check_configs": "config_check",
    "compare": "comparison",
    "proxy_hooks": "integrations.transformer_lens",
    "register": "integrations.sae_lens",
    "run_evals": "integrations.sae_lens",
    "split": "data",
    "unregister": "integrations.sae_lens",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Is this the SAE that a certificate is about?"""

from __future__ import annotations

from typing import Any

from saelens_certify.certificate import Certificate
from saelens_certify.errors import CertifyError
from saelens_certify.manifest import parameters_sha256, settings_sha256
from saelens_certify.saes import SAEAdapter


def check_sae(certificate: Certificate, sae: Any, adapter: SAEAdapter) -> None:
    """Check that an SAE is the one that was certified.

    Raises:
        CertifyError: If its weights, its settings or its hooks are others.
    """
    identity = certificate.manifest["identity"]
    found = parameters_sha256(sae.named_parameters())
    if found != identity["sae_sha256"]:
        raise CertifyError(
            f"this is not the certified SAE: its parameters hash to {found[:12]}…, the certificate has "
            f"{identity['sae_sha256'][:12]}… (a cast to another dtype also changes them); load the SAE "
            "as it was certified, or certify this one"
        )
    if settings_sha256(adapter.config) != identity["sae_config_sha256"]:
        raise CertifyError(
            "the SAE has the certified weights but other settings in its cfg; certify it as it is"
        )
    for name, hook, key in (
        ("reads", adapter.input_hook, "hook_in"),
        ("writes", adapter.output_hook, "hook_out"),
    ):
        if hook != identity[key]:
            raise CertifyError(
                f"the SAE {name} at {hook}, the certificate is about {identity[key]}; certify it there"
            )

"""A certificate in SAEBench's envelope: what stands in ``certificate.json``."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from saelens_certify.controls import shuffle_entries
from saelens_certify.manifest import provenance

if TYPE_CHECKING:
    from saelens_certify.certificate import Certificate

EVAL_TYPE = "faithfulness_certificate"


def envelope(certificate: Certificate, files: Mapping[str, str]) -> dict[str, Any]:
    """Return plain JSON values, a pure function of the run: nothing in them is free to change.

    Args:
        certificate: The certificate.
        files: SHA-256 of every other file of the run, by name relative to its folder.
    """
    sae = certificate.manifest["sae"]
    origin = sae.get("origin", {})
    identity = json.dumps(certificate.manifest["identity"], sort_keys=True)
    return {
        "eval_type_id": EVAL_TYPE,
        "eval_config": certificate.manifest["config"],
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, identity)),
        "datetime_epoch_millis": certificate.manifest["created_epoch_millis"],
        "eval_result_metrics": certificate.to_metrics(),
        "eval_result_details": [],
        "sae_bench_commit_hash": "",
        "sae_lens_id": origin.get("sae_id") or sae["id"],
        "sae_lens_release_id": origin.get("release"),
        "sae_lens_version": certificate.manifest["versions"]["sae-lens"],
        "sae_cfg_dict": sae["config"],
        "eval_result_unstructured": {
            "verdict": certificate.verdict(),
            "stop": None if certificate.stop is None else dataclasses.asdict(certificate.stop),
            "bounds": {
                name: {
                    "value": bound.value,
                    "confidence": bound.confidence,
                    "theorem": bound.theorem,
                    "assumptions": list(bound.assumptions),
                    "terms": dict(bound.terms),
                    **({} if bound.lower is None else {"lower": bound.lower}),
                }
                for name, bound in certificate.bounds.items()
            },
            "shuffle_tests": shuffle_entries(certificate.shuffle_tests),
            "unigram_risk": dataclasses.asdict(certificate.unigram_risk),
            "kept": {
                name: {**dataclasses.asdict(share), "assumptions": list(share.assumptions)}
                for name, share in certificate.kept.items()
            },
            "provenance": provenance(certificate.manifest),
            "identity": certificate.manifest["identity"],
            "files": dict(sorted(files.items())),
        },
    }

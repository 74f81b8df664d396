"""The SAE that a training run would save now: scaler folded, training form converted, on a copy.

In training form BatchTopK and Matryoshka rank over the whole batch, and every SAE sees scaled
activations. A certificate is about what will be used, so both are undone as SAELens does at the end of
training; but SAELens folds into the live SAE and converts by way of a folder, here a copy is changed.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from saelens_certify.errors import CertifyError
from saelens_certify.integrations.sae_lens.state import preserved_rng

_PER_TOKEN = ("layer_norm", "constant_norm_rescale")


def is_training_form(sae: Any) -> bool:
    """Whether this is a training SAE, which is converted when it is saved for use."""
    return hasattr(sae, "process_state_dict_for_saving_inference")


def is_identity(scaler: Any) -> bool:
    """Whether an ActivationScaler does nothing."""
    return scaler is None or (
        getattr(scaler, "scaling_factor", None) is None
        and getattr(scaler, "whitening", None) is None
    )


@torch.no_grad()
def inference_form(sae: Any, scaler: Any = None) -> Any:
    """Return the SAE as it would be used: in inference form and for raw activations.

    Args:
        sae: A SAELens SAE or TrainingSAE. It is not changed.
        scaler: The ActivationScaler whose effect the SAE still lacks, if any. It is not changed.

    Returns:
        The same object if there is nothing to do, else a copy with weights of its own.

    Raises:
        CertifyError: If SAELens cannot fold the scaler into this SAE, or a copy would be another SAE.
    """
    training, identity = is_training_form(sae), is_identity(scaler)
    if identity and not training:
        return sae
    if getattr(sae, "use_error_term", False):
        raise CertifyError(
            "the SAE has use_error_term=True, which adds back everything it fails to explain; "
            "set sae.use_error_term = False to certify the reconstruction"
        )
    if not identity:
        _check_foldable(sae)
    with preserved_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how to load the model, said when the SAE was made
        result = _copy(sae)
        if not identity:
            _fold(result, scaler)
        if training:
            result = _converted(result)
        return result.to(device=_device(sae)).eval()


def _check_foldable(sae: Any) -> None:
    mode = sae.cfg.normalize_activations
    if mode in _PER_TOKEN:
        raise CertifyError(
            f"an activation_scaler was given for an SAE that normalises each token itself "
            f"(normalize_activations = {mode!r}); folding would be wrong. Pass ActivationScaler()"
        )
    if "transcoder" in sae.cfg.architecture():
        raise CertifyError(
            "an activation_scaler was given for a transcoder, whose input and output are at different "
            "hooks and have different scales. Pass ActivationScaler()"
        )


def _copy(sae: Any) -> Any:
    """A new object of the same class; `copy.deepcopy` would share closures that write to the original."""
    cfg = copy.deepcopy(sae.cfg)
    # `sae.half()` and `sae.bfloat16()` leave the configuration as it was; only `sae.to(...)` does not.
    cfg.dtype = _dtype(sae, cfg.dtype)
    fresh = type(sae)(cfg)
    fresh.load_state_dict(
        {name: value.detach().clone() for name, value in sae.state_dict().items()}
    )
    return fresh


def _dtype(sae: Any, named: str) -> str:
    """The dtype that the parameters have, as SAELens writes it."""
    found = {parameter.dtype for parameter in sae.parameters()}
    if len(found) > 1:
        raise CertifyError(
            f"the SAE has parameters of several dtypes ({', '.join(sorted(map(str, found)))}), and in "
            "the form that is saved all have one; choose it with sae.to(dtype=...)"
        )
    return str(found.pop()).removeprefix("torch.") if found else named


def _device(sae: Any) -> torch.device:
    tensors = (*sae.parameters(), *sae.buffers())
    return tensors[0].device if tensors else torch.device(sae.cfg.device)


def _fold(sae: Any, scaler: Any) -> None:
    """Fold the scaler as the trainer does at the end: whitening acts on what is already scaled."""
    try:
        if scaler.whitening is not None:
            sae.fold_activation_whitening(
                mean=scaler.whitening.mean,
                whitening_matrix=scaler.whitening.matrix,
                unwhitening_matrix=scaler.whitening.inverse_matrix,
            )
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    except (NotImplementedError, ValueError) as error:
        raise CertifyError(
            f"the activation_scaler cannot be folded into a {sae.cfg.architecture()!r} SAE: {error}"
        ) from error


def _converted(sae: Any) -> Any:
    """What ``save_inference_model`` writes and ``SAE.load_from_disk`` reads, without the disk."""
    from sae_lens import SAE

    state = sae.state_dict()  # of a copy that nobody else has
    sae.process_state_dict_for_saving_inference(state)
    saved = SAE.from_dict(sae.cfg.get_inference_sae_cfg_dict())
    saved.process_state_dict_for_loading(state)
    saved.load_state_dict(state)
    return saved

"""Checks of what a monitor is given: is this the certified SAE, on a model that it can watch?"""

from __future__ import annotations

import math
import numbers
from typing import Any

from saelens_certify.certificate import Certificate
from saelens_certify.errors import CertifyError
from saelens_certify.forward import check_hook, resolve_hook
from saelens_certify.manifest import parameters_sha256
from saelens_certify.saes import SAEAdapter


def check_model(model: Any) -> None:
    """Check that a model has hooks.

    Raises:
        CertifyError: If it is something else, such as a name.
    """
    if not hasattr(model, "hook_dict"):
        raise CertifyError(
            f"{type(model).__name__} has no hooks; pass a TransformerLens model (TransformerBridge or "
            "HookedTransformer)"
        )


def watched_hooks(model: Any, adapter: SAEAdapter) -> tuple[str, str]:
    """Return where a model shows the activations at the SAE's input and output hooks.

    Where an SAE is attached (``model.add_sae``), the hook has given way to it, and the model's own
    activation is what that SAE reads.

    Returns:
        The two names, as the model knows them; the same twice where the SAE writes where it reads.

    Raises:
        CertifyError: If the model has no such hook, or an attached transcoder hides the activation
            that its output replaces.
    """
    check_model(model)
    attached = getattr(model, "_acts_to_saes", None) or {}
    same = adapter.input_hook == adapter.output_hook
    for name, wrapper in attached.items():
        places = {name, wrapper.sae.cfg.metadata.hook_name_out or name}
        if adapter.output_hook not in places:
            continue
        if not same or len(places) > 1:
            raise CertifyError(
                f"an SAE is attached to the model at {adapter.output_hook!r}, where the monitor would see "
                "its output instead of the model's activation; call model.reset_saes(), and to run with "
                "the reconstruction put proxy_hooks(...) after the monitor's hooks"
            )
        point = wrapper.hook_sae_input
        found = next(key for key, value in model.hook_dict.items() if value is point)
        return found, found
    names = []
    for name in (adapter.input_hook, adapter.output_hook):
        check_hook(model, name)
        names.append(resolve_hook(model, name))
    return names[0], names[1]


def check_once(point: Any, function: Any) -> None:
    """Check that a hook is on its hook point once.

    Args:
        point: The hook point that fires it; None, and anything but a hook point, tells nothing.
        function: The hook.

    Raises:
        CertifyError: If it is there more than once: evidence would be counted that often.
    """
    handles = getattr(point, "fwd_hooks", ())
    # Releases of TransformerLens that do not remember the user's function tell nothing either.
    n = sum(getattr(handle, "user_hook", None) == function for handle in handles)
    if n > 1:
        raise CertifyError(
            f"the monitor's hook fires {n} times in one forward, which is not counted; give the hooks of "
            "one monitor to a forward once: either attached(model) or fwd_hooks"
        )


def other_model(certificate: Certificate, model: Any) -> tuple[str, ...]:
    """Return a note if a model's parameters are not those that were certified."""
    found = parameters_sha256(getattr(model, "original_model", model).named_parameters())
    if found == certificate.manifest["identity"]["model_sha256"]:
        return ()
    return (
        "the model's parameters are not those that were certified (another dtype, class or processing of "
        "the same weights also changes them); an alarm may be about the model, not the stream",
    )


def check_numbers(
    false_alarm: Any, run_length: Any, share: Any, seed: Any, window: Any, on_error: Any
) -> None:
    """Check the settings of a monitor.

    Raises:
        CertifyError: Naming the one that is out of its range.
    """
    if not _is_real(false_alarm) or not 0 < false_alarm < 1:
        raise CertifyError(f"false_alarm must lie strictly between 0 and 1, got {false_alarm!r}")
    if run_length is not None and not (_is_real(run_length) and run_length > 1):
        raise CertifyError(f"run_length must be a number above 1, or None, got {run_length!r}")
    if share is not None and not (_is_real(share) and 0 < share <= 1):
        raise CertifyError(f"share must lie in (0, 1], or be None, got {share!r}")
    for name, value, minimum in (("seed", seed, None), ("window", window, 1)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise CertifyError(f"{name} must be an integer, got {value!r}")
        if minimum is not None and value < minimum:
            raise CertifyError(f"{name} must be at least {minimum}, got {value!r}")
    if on_error not in ("record", "raise"):
        raise CertifyError(f"on_error must be 'record' or 'raise', got {on_error!r}")


def _is_real(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(float(value))

"""Opt-in: make SAELens's own evaluation include the certificate, and take it back.

SAELens has no plug-in mechanism, so two names are replaced: ``sae_lens.evals.run_evals``, which its
``multiple_evals`` and command line look up when they run, and ``sae_lens.run_evals``. Before that the
installed version is compared with what this module knows.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import sae_lens
import sae_lens.evals

from saelens_certify.errors import CertifyError
from saelens_certify.integrations.sae_lens.certificates import Certificates
from saelens_certify.integrations.sae_lens.evals import (
    EXTRA_SETTINGS,
    check_settings,
    is_plain,
    run_evals,
)

_PATCHED: tuple[tuple[ModuleType, str], ...] = (
    (sae_lens.evals, "run_evals"),
    (sae_lens, "run_evals"),
)

_EXPECTED: dict[str, tuple[str, ...]] = {
    "run_evals": (
        "sae",
        "activation_store",
        "model",
        "activation_scaler",
        "eval_config",
        "model_kwargs",
        "exclude_special_tokens",
        "verbose",
    ),
    "multiple_evals": (
        "sae_regex_pattern",
        "sae_block_pattern",
        "n_eval_reconstruction_batches",
        "n_eval_sparsity_variance_batches",
        "eval_batch_size_prompts",
        "datasets",
        "dataset_trust_remote_code",
        "ctx_lens",
        "output_dir",
        "verbose",
    ),
    "run_evaluations": ("args",),
    "process_results": ("eval_results", "output_dir"),
    "process_args": ("args",),
    "run_evals_cli": ("args",),
}
# Who must look up whom by name when it runs, for the replacement to be seen.
_CALLS = (
    ("multiple_evals", "run_evals"),
    ("run_evaluations", "multiple_evals"),
    ("run_evals_cli", "run_evaluations"),
    ("run_evals_cli", "process_results"),
)

_lock = threading.RLock()
_registrations: list[Registration] = []
# What stood under each replaced name, and what was put there; empty when nothing is replaced.
_installed: dict[tuple[str, str], tuple[Any, Any]] = {}


class Registration:
    """One `register`: ends with `close`, or at the end of its with-block.

    Attributes:
        settings: Extra arguments of `run_evals` that hold while this is the newest registration.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def close(self) -> None:
        """End this registration; the last one puts SAELens's functions back.

        Raises:
            CertifyError: If somebody else replaced a function meanwhile (see `unregister`).
        """
        with _lock:
            if not any(item is self for item in _registrations):
                return
            _registrations[:] = [item for item in _registrations if item is not self]
            if not _registrations:
                _restore()

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CertifyError as refusal:
            if error is None:
                raise
            warnings.warn(str(refusal), stacklevel=2)  # must not hide what went wrong inside


def register(**settings: Any) -> Registration:
    """Make ``sae_lens.run_evals``, ``multiple_evals`` and SAELens's command line include the certificate.

    May be called again: the newest settings hold, and one `unregister` ends all. As a context manager it
    ends only itself. Modules that imported ``run_evals`` by name before keep SAELens's function;
    training runs have `CertifyingEvaluator`.

    A call that names one of these settings itself has it its own way. Equal certificates (an SAE evaluated
    with another context length) are issued once.

    Args:
        **settings: Extra arguments of `run_evals`: ``certify_config``, ``n_evaluation_sequences`` and so
            on. Two of them are made for many SAEs: ``output`` is a folder in which each SAE, on each
            set of documents, has a folder of its own (`Certificates`); ``on_refusal`` is ``"record"``
            unless it is given, so that an SAE that cannot be certified does not stop the others.

    Returns:
        A registration, to be closed or used in a with-statement.

    Raises:
        CertifyError: If a setting is unknown or has a wrong value, or the installed SAELens is not the
            one this was written for: naming version and difference.
    """
    unknown = sorted(set(settings) - EXTRA_SETTINGS)
    if unknown:
        raise CertifyError(f"register has no settings {unknown}; it has {sorted(EXTRA_SETTINGS)}")
    check_settings(**settings)
    made = {"on_refusal": "record", **settings}
    if not isinstance(made.get("output"), Certificates):
        made["output"] = Certificates(made.get("output"))
    with _lock:
        if not _installed:
            check_sae_lens()
            _install()
        registration = Registration(made)
        _registrations.append(registration)
        return registration


def unregister() -> None:
    """End every registration and put the very same functions back; does nothing if there is none.

    Raises:
        CertifyError: If somebody else replaced a function after `register`. The certificate is no
            longer added then, but what stands in the way has to be undone first: then call this again.
    """
    with _lock:
        _registrations.clear()
        _restore()


def check_sae_lens() -> None:
    """Compare the installed SAELens with what `register` relies on.

    Raises:
        CertifyError: Naming the version and the difference.
    """
    for name, expected in _EXPECTED.items():
        function = getattr(sae_lens.evals, name, None)
        if function is None:
            raise _changed(f"sae_lens.evals has no {name}")
        found = tuple(inspect.signature(function).parameters)
        if found != expected:
            raise _changed(f"sae_lens.evals.{name} takes {found}, expected {expected}")
    if sae_lens.run_evals is not sae_lens.evals.run_evals:
        raise _changed(
            "sae_lens.run_evals and sae_lens.evals.run_evals are not the same function, so one was "
            "replaced"
        )
    for caller, name in _CALLS:
        function = inspect.unwrap(getattr(sae_lens.evals, caller))
        code = getattr(function, "__code__", None)
        if code is None or name not in code.co_names:
            raise _changed(
                f"sae_lens.evals.{caller} does not call {name} by its name in the module"
            )


def _changed(difference: str) -> CertifyError:
    return CertifyError(
        f"register does not know this SAELens (version {sae_lens.__version__}): {difference}. Use "
        "saelens_certify.run_evals(...) directly, or update saelens_certify"
    )


def _install() -> None:
    original = sae_lens.evals.run_evals
    wrapper = _with_certificate(original)
    for module, name in _PATCHED:
        _installed[module.__name__, name] = (original, wrapper)
        setattr(module, name, wrapper)


def _restore() -> None:
    """Put back what was there, all names or none."""
    if not _installed:
        return
    for module, name in _PATCHED:
        found, ours = getattr(module, name, None), _installed[module.__name__, name][1]
        if found is not ours:
            raise CertifyError(
                f"{module.__name__}.{name} was replaced by {_describe(found)} after register(), so putting "
                "SAELens's function back would undo that too. The certificate is no longer added; undo "
                "the other replacement, then call unregister() again"
            )
    for module, name in _PATCHED:
        setattr(module, name, _installed[module.__name__, name][0])
    _installed.clear()


def _with_certificate(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run_evals_with_certificate(*args: Any, **kwargs: Any) -> Any:
        with _lock:
            settings = _registrations[-1].settings if _registrations else None
        if settings is None or is_plain():
            return original(*args, **kwargs)
        return run_evals(*args, **{**settings, **kwargs})

    return run_evals_with_certificate


def _describe(function: Any) -> str:
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(function)

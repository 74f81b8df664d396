"""`run_evals`: SAELens's evaluation with a faithfulness certificate as one more group of metrics."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, get_args

import sae_lens.evals
from sae_lens.evals import EvalConfig

from saelens_certify.certificate import Certificate
from saelens_certify.certification import certify
from saelens_certify.config import CertifyConfig
from saelens_certify.envelope import EVAL_TYPE
from saelens_certify.errors import CertifyError
from saelens_certify.forward.seams import seams_of
from saelens_certify.integrations.sae_lens.activations_store import (
    N_CALIBRATION,
    N_EVALUATION,
    draw,
    is_store,
    resolve_stores,
)
from saelens_certify.integrations.sae_lens.certificates import Certificates
from saelens_certify.integrations.sae_lens.inference import inference_form
from saelens_certify.integrations.sae_lens.state import preserved_rng
from saelens_certify.preflight import check_bare
from saelens_certify.preparation import sequences_for
from saelens_certify.store_draws import check_numbers

OnRefusal = Literal["raise", "record"]
RunEvals = Callable[..., tuple[dict[str, Any], dict[str, Any]]]

GROUP = EVAL_TYPE
"""Name of the group in ``all_metrics``."""

_plain: ContextVar[bool] = ContextVar("saelens_certify_plain_run_evals", default=False)


def run_evals(
    sae: Any,
    activation_store: Any,
    model: Any,
    activation_scaler: Any,
    eval_config: EvalConfig = EvalConfig(),  # noqa: B008 (SAELens's own default; never written to)
    model_kwargs: Mapping[str, Any] = {},  # noqa: B006 (as above)
    exclude_special_tokens: Iterable[int] | bool = True,
    verbose: bool = False,
    *,
    certify_config: CertifyConfig | None = None,
    calibration: Any = None,
    evaluation: Any = None,
    n_calibration_sequences: int = N_CALIBRATION,
    n_evaluation_sequences: int = N_EVALUATION,
    one_document_per_row: bool = False,
    output: str | Path | Certificates | None = None,
    on_refusal: OnRefusal = "raise",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``sae_lens.run_evals`` with the group ``faithfulness_certificate`` in addition.

    SAELens's own groups come from SAELens's own function, on the tokens that it draws itself. The
    certificate is issued first, so that what cannot be certified is refused before the long work, and
    it does not move the store's position. SAE, model, store and random generators are left as they were.

    Args:
        sae: As in SAELens. A training SAE is certified in the form in which it would be saved.
        activation_store: As in SAELens. Without ``calibration`` and ``evaluation``, the certificate's
            documents come from the dataset below it (see `documents_of_store`).
        model: As in SAELens.
        activation_scaler: As in SAELens. A factor or whitening that is not folded into the SAE yet is
            folded into a copy for the certificate.
        eval_config: As in SAELens.
        model_kwargs: As in SAELens; the certificate's forward passes know none.
        exclude_special_tokens: As in SAELens; the certificate follows ``certify_config.positions``.
        verbose: As in SAELens; also shows the certificate's progress, unless ``certify_config`` is given.
        certify_config: Settings of the certificate.
        calibration: Calibration documents in place of the store's: whatever `certify` takes, or a store.
        evaluation: Evaluation documents; both or none.
        n_calibration_sequences: Sequences to draw from the store.
        n_evaluation_sequences: Sequences to draw from the store.
        one_document_per_row: Assert that each row of a pre-tokenised dataset is one document.
        output: Folder for the certificate's manifest and evidence; a killed run resumes there. Of
            several SAEs each needs its own: `Certificates` gives them one.
        on_refusal: What to do if no certificate can be issued: ``"raise"``, or ``"record"`` the reason as
            ``{"refused": reason}`` with a warning and go on with SAELens's metrics.

    Returns:
        ``(all_metrics, feature_metrics)``, nested as SAELens nests them.

    Raises:
        CertifyError: If no certificate can be issued, naming the thing, the value and the remedy; whatever
            ``on_refusal`` is, if a setting has a wrong value or there is no store.
    """
    check_settings(
        certify_config=certify_config,
        calibration=calibration,
        evaluation=evaluation,
        n_calibration_sequences=n_calibration_sequences,
        n_evaluation_sequences=n_evaluation_sequences,
        one_document_per_row=one_document_per_row,
        output=output,
        on_refusal=on_refusal,
    )
    if not is_store(activation_store):
        raise CertifyError(
            f"activation_store must be an ActivationsStore, got {type(activation_store).__name__}: "
            "SAELens's own metrics read it; make one with ActivationsStore.from_sae(model, sae, "
            "dataset=...), or call certify(...) for the certificate alone"
        )
    config = CertifyConfig(progress=bool(verbose)) if certify_config is None else certify_config
    try:
        seams_of(model)  # refuses what is no TransformerLens model
        if model_kwargs:
            raise CertifyError(
                f"model_kwargs = {dict(model_kwargs)!r} change the model's forward pass, and a "
                "certificate is about the model as it is; pass none, or run sae_lens.run_evals alone"
            )
        with preserved_rng():
            if calibration is None:
                calibration, evaluation = draw(
                    activation_store,
                    config,
                    model=model,
                    n_calibration=n_calibration_sequences,
                    n_evaluation=n_evaluation_sequences,
                    one_document_per_row=one_document_per_row,
                )
            else:
                calibration, evaluation = resolve_stores(model, calibration, evaluation, config)
            form = inference_form(sae, activation_scaler)

            def issue(
                calibration: Any, evaluation: Any, folder: str | Path | None
            ) -> dict[str, Any]:
                certificate: Certificate = certify(
                    model,
                    form,
                    calibration=calibration,
                    evaluation=evaluation,
                    config=config,
                    output=folder,
                )
                return certificate.to_metrics()[GROUP]

            group: dict[str, Any]
            if isinstance(output, Certificates):
                check_bare(model, form)  # what is attached is in no hash
                group = output.group(
                    issue,
                    model=model,
                    sae=form,
                    calibration=sequences_for(model, calibration, config),
                    evaluation=sequences_for(model, evaluation, config),
                    config=config,
                )
            else:
                group = issue(calibration, evaluation, output)
    except CertifyError as error:
        if on_refusal == "raise":
            raise
        warnings.warn(f"no certificate: {error}", stacklevel=2)
        group = {"refused": str(error)}
    with _as_found(sae):
        all_metrics, feature_metrics = sae_lens_run_evals()(
            sae,
            activation_store,
            model,
            activation_scaler,
            eval_config,
            model_kwargs,
            exclude_special_tokens,
            verbose,
        )
    return {**all_metrics, GROUP: group}, feature_metrics


def check_settings(
    *,
    certify_config: Any = None,
    calibration: Any = None,
    evaluation: Any = None,
    n_calibration_sequences: Any = N_CALIBRATION,
    n_evaluation_sequences: Any = N_EVALUATION,
    one_document_per_row: Any = False,
    output: Any = None,
    on_refusal: Any = "raise",
) -> None:
    """Check the settings that `run_evals` has beyond those of SAELens, before there is an SAE.

    Raises:
        CertifyError: If one has a value that it cannot have.
    """
    if on_refusal not in get_args(OnRefusal):
        raise CertifyError(f"on_refusal must be one of {get_args(OnRefusal)}, got {on_refusal!r}")
    CertifyConfig.check(certify_config, "certify_config")
    if (calibration is None) != (evaluation is None):
        raise CertifyError("give calibration= and evaluation= together, or neither")
    check_numbers(n_calibration_sequences, n_evaluation_sequences)
    if not isinstance(one_document_per_row, bool):
        raise CertifyError(
            f"one_document_per_row must be True or False, got {one_document_per_row!r}"
        )
    if output is not None and not isinstance(output, (str, Path, Certificates)):
        raise CertifyError(f"output must be a folder, got {output!r}")


def sae_lens_run_evals() -> RunEvals:
    """SAELens's function as it is installed now, without the group that `register` adds."""

    def plain(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        token = _plain.set(True)
        try:
            return sae_lens.evals.run_evals(*args, **kwargs)
        finally:
            _plain.reset(token)

    return plain


def is_plain() -> bool:
    """Whether the group is being added further out already."""
    return _plain.get()


@contextmanager
def _as_found(sae: Any) -> Iterator[None]:
    """Turn hook_z reshaping back on if SAELens's evaluation raises, which leaves it off."""
    before = getattr(sae, "hook_z_reshaping_mode", None)
    try:
        yield
    finally:
        if before is True and not sae.hook_z_reshaping_mode:
            sae.turn_on_forward_pass_hook_z_reshaping()


EXTRA_SETTINGS = frozenset(
    name
    for name, parameter in inspect.signature(run_evals).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)
"""The settings that `run_evals` has beyond those of SAELens."""

"""Certificates beside published SAEs: in the folder, in the repository, in the model card."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelens_certify.certificate import Certificate
from saelens_certify.errors import CertifyError
from saelens_certify.evidence import CERTIFICATE, MANIFEST, RunFolder, finished_run, read_json
from saelens_certify.integrations.model_card import insert_section, model_card_section
from saelens_certify.integrations.sae_bench import check_certificate
from saelens_certify.manifest import parameters_sha256, settings_sha256
from saelens_certify.saes.checkpoint import holds
from saelens_certify.saes.loading import open_sae
from saelens_certify.storage import write_atomically
from saelens_certify.verification import verify

EVIDENCE_FOLDER = "certificate"
"""Folder beside ``cfg.json`` that holds a whole run, where the evidence is attached too."""

README = "README.md"


def attach(
    certificate: Certificate | str | Path, sae_folder: str | Path, *, evidence: bool = False
) -> Path:
    """Put ``certificate.json`` beside the ``cfg.json`` of the SAE that it is about.

    The certificate is verified first, and compared with the weights and the settings in the folder.

    Args:
        certificate: A certificate, or a run's folder.
        sae_folder: The SAE's folder, as `upload_saes_to_huggingface` takes it.
        evidence: Whether to put the whole run into ``certificate/`` too (manifest, calibration and
            evidence, a few hundred bytes per sequence), so that others can run
            ``saelens-certify verify`` on it. It names documents and local paths. A run that is there
            is replaced.

    Returns:
        The path of ``certificate.json``.

    Raises:
        EvidenceError: If the run's folder is damaged or edited.
        CertifyError: If the folder holds another SAE, or the same in a dtype that rounding led to;
            without ``evidence``, if that of another certificate is attached.
    """
    folder = Path(sae_folder)
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        if isinstance(certificate, Certificate):
            certificate.save(run)
        else:
            run = finished_run(certificate).path
        checked = verify(run).certificate
        _check_weights(checked, folder)
        content = (run / CERTIFICATE).read_bytes()
        if evidence:
            _copy_run(RunFolder(run), folder / EVIDENCE_FOLDER)
        else:
            _check_evidence(folder, content)
        target = folder / CERTIFICATE
        write_atomically(target, content)
    return target


def read_certificate(sae_folder: str | Path) -> dict[str, Any]:
    """Read the ``certificate.json`` in a folder and check its form.

    Args:
        sae_folder: An SAE's folder or a run's.

    Raises:
        EvidenceError: If there is none, or it has another form; whether it is true, `verify` tells.
    """
    values = read_json(Path(sae_folder) / CERTIFICATE)
    check_certificate(values)
    return values


def upload_saes_to_huggingface(
    saes_dict: Mapping[str, Any],
    hf_repo_id: str,
    hf_revision: str = "main",
    show_progress: bool = True,
    add_default_readme: bool = True,
    *,
    model_card: bool = True,
) -> None:
    """Upload SAEs as ``sae_lens.upload_saes_to_huggingface`` does, with their certificates.

    SAELens uploads the files that it knows and leaves ``certificate.json`` behind; here it follows, with
    the evidence if that was attached, and a section of the model card for each certificate.

    Args:
        saes_dict: SAEs or folders by id; certificates are found in folders.
        hf_repo_id: The repository.
        hf_revision: Its branch.
        show_progress: Whether to show a progress bar.
        add_default_readme: Whether SAELens adds a README.md if there is none.
        model_card: Whether to write the certificates into README.md, between markers; what
            stands outside of them stays.

    Raises:
        CertifyError: Before anything is uploaded, if a certificate is not about the SAE beside it, or
            the evidence there is another certificate's.
    """
    from huggingface_hub import HfApi
    from sae_lens import SAE
    from sae_lens import upload_saes_to_huggingface as upload

    certificates: dict[str, dict[str, Any]] = {}
    for sae_id, sae in saes_dict.items():
        if not isinstance(sae, SAE) and (Path(sae) / CERTIFICATE).exists():
            certificates[sae_id] = read_certificate(sae)
            _check_identity(certificates[sae_id], Path(sae))
            _check_evidence(Path(sae), (Path(sae) / CERTIFICATE).read_bytes())
    upload(dict(saes_dict), hf_repo_id, hf_revision, show_progress, add_default_readme)
    api = HfApi()
    for sae_id in certificates:
        api.upload_folder(
            folder_path=saes_dict[sae_id],
            path_in_repo=sae_id,
            repo_id=hf_repo_id,
            revision=hf_revision,
            repo_type="model",
            commit_message=f"Upload certificate of {sae_id}",
            allow_patterns=[CERTIFICATE, f"{EVIDENCE_FOLDER}/*"],
        )
    if certificates and model_card:
        _update_card(api, certificates, hf_repo_id, hf_revision)


def update_readme(
    path: str | Path, certificates: Mapping[str, Mapping[str, Any] | Certificate]
) -> Path:
    """Write certificates into a local README.md; see `insert_section`.

    Args:
        path: The file, in UTF-8; made if missing, with its folder.
        certificates: Each certificate, or the values of its ``certificate.json``, by the SAE's id in
            the repository.

    Returns:
        The path.

    Raises:
        CertifyError: If the path is a folder, or the file is not UTF-8 or has damaged markers.
    """
    path = Path(path)
    if path.is_dir():
        raise CertifyError(f"{str(path)!r} is a folder; give the file, e.g. {str(path / README)!r}")
    card = _with_sections(_read_card(path) if path.exists() else "", certificates)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CertifyError(f"the folder of {str(path)!r} cannot be made: {error}") from None
    write_atomically(path, card.encode())
    return path


def _read_card(path: Path) -> str:
    """Read a model card with its line ends."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CertifyError(
            f"{str(path)!r} is not UTF-8 ({error}); save it as UTF-8 first, as the hub asks for"
        ) from None


def _with_sections(card: str, certificates: Mapping[str, Mapping[str, Any] | Certificate]) -> str:
    for sae_id, values in certificates.items():
        card = insert_section(card, model_card_section(values, sae_id=sae_id), sae_id)
    return card


def _update_card(
    api: Any, certificates: Mapping[str, Mapping[str, Any]], repo_id: str, revision: str
) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = api.hf_hub_download(repo_id, README, revision=revision, force_download=True)
        card = _read_card(Path(file))
    except EntryNotFoundError:
        card = "---\nlibrary_name: saelens\n---\n"
    updated = _with_sections(card, certificates)
    if updated != card:
        api.upload_file(
            path_or_fileobj=updated.encode(),
            path_in_repo=README,
            repo_id=repo_id,
            revision=revision,
            commit_message="Certificates in the model card",
        )


def _check_weights(certificate: Certificate, folder: Path) -> None:
    manifest = certificate.manifest
    _compare(manifest["identity"], manifest["sae"]["dtype"], folder)


def _check_identity(values: Mapping[str, Any], folder: Path) -> None:
    said = values["eval_result_unstructured"]
    _compare(said["identity"], said["provenance"]["sae"]["dtype"], folder)


def _compare(identity: Mapping[str, Any], dtype: str, folder: Path) -> None:
    """Compare the SAE in a folder with the one that was certified, in the dtype that was certified."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a change of dtype is looked at below
        loaded = open_sae(folder, dtype=dtype)
    found = parameters_sha256(loaded.sae.named_parameters())
    if found != identity["sae_sha256"]:
        raise CertifyError(
            f"the certificate is not about the SAE in {str(folder)!r}: its weights hash to "
            f"{found[:12]}…, the certified ones to {identity['sae_sha256'][:12]}…"
        )
    if settings_sha256(loaded.sae.cfg.to_dict()) != identity["sae_config_sha256"]:
        raise CertifyError(
            f"the certificate is not about the SAE in {str(folder)!r}: its weights are the certified "
            "ones, but settings in its cfg.json (k, normalisation, …) are not"
        )
    if loaded.checkpoint_dtype is not None and not holds(dtype, loaded.checkpoint_dtype):
        raise CertifyError(
            f"the certificate is about the weights rounded to {dtype}, the folder {str(folder)!r} stores "
            f"them in {loaded.checkpoint_dtype}; certify that, or save the SAE in {dtype}"
        )


def _check_evidence(folder: Path, certificate: bytes) -> None:
    """Check that evidence attached to an SAE's folder is that of a certificate."""
    attached = folder / EVIDENCE_FOLDER
    if not (attached / MANIFEST).exists():
        return
    sealed = attached / CERTIFICATE
    if not sealed.exists() or sealed.read_bytes() != certificate:
        raise CertifyError(
            f"{str(attached)!r} holds the evidence of another certificate; replace it with "
            "attach(..., evidence=True), or remove that folder first"
        )


def _copy_run(run: RunFolder, target: Path) -> None:
    """Copy the files of a run, and nothing that lies beside them; a run that is there stays till then."""
    if run.path.resolve() == target.resolve():
        return
    if target.exists() and not (target / MANIFEST).exists():
        raise CertifyError(f"{str(target)!r} exists and holds no run; move it out of the way")
    names = [CERTIFICATE, *read_json(run.path / CERTIFICATE)["eval_result_unstructured"]["files"]]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        copied, replaced = Path(scratch) / "new", Path(scratch) / "old"
        for name in names:
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.path / name, copied / name)
        if target.exists():
            os.replace(target, replaced)  # only an empty folder can be replaced in one step
        os.replace(copied, target)

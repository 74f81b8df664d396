"""Judging a published SAE: check its configuration, certify it, put the certificate beside it."""

import tempfile
from pathlib import Path

from saelens_certify import CertifyConfig, CertifyError, certify, check_config, demo, verify
from saelens_certify.integrations.hub import attach, read_certificate, update_readme
from saelens_certify.saes import matching

# Which SAEs are there? Patterns as in sae_lens.evals; nothing is fetched.
specs = matching("gpt2-small-res-jb", r"blocks\.(5|6)\.hook_resid_pre")
print("registered:", ", ".join(map(str, specs)))

# A folder stands in for the published SAE; "release/sae_id" and "owner/repository/folder" work alike.
work = Path(tempfile.mkdtemp())
folder = work / "saes" / "layer_4"
demo.load_sae("layer4-topk").save_model(folder)
model = demo.load_model()
settings = CertifyConfig(permutations=1, random_decoders=1, progress=False)

# What configurations tell is refused before weights are fetched.
check_config(folder, model, settings)
wrong = demo.load_sae("layer4-topk").cfg
wrong.normalize_activations = "expected_average_only_in"
wrong.metadata.model_name = "gpt2-small"
try:
    check_config(wrong, model, settings)
except CertifyError as error:
    print(error)

certificate = certify(
    model,
    folder,
    calibration=demo.load_texts("calibration")[:1000],
    evaluation=demo.load_texts("evaluation")[:1000],
    config=settings,
    output=work / "run",
)
print(certificate.verdict())
controls = certificate.controls
shuffled, random = (controls[name]["gap"] for name in ("permuted_0", "random_decoder_0"))
gap = certificate.measured.gap
print(f"gap: {gap:.2f} bits; features shuffled: {shuffled:.2f}, random decoder: {random:.2f}")

# Weights are compared with the certificate; with the evidence beside them, anybody can recompute it.
attach(work / "run", folder, evidence=True)
readme = update_readme(work / "README.md", {"layer_4": read_certificate(folder)})
print("beside cfg.json:", ", ".join(sorted(path.name for path in folder.iterdir())))
print("model card:", readme.read_text().splitlines()[1])
print("verified:", verify(folder / "certificate").n_sequences, "sequences")

# The same SAE after one more step of training is another SAE.
changed = demo.load_sae("layer4-topk")
changed.b_dec.data[0] += 1e-3
changed.save_model(folder)
try:
    attach(work / "run", folder)
except CertifyError as error:
    print("refused:", str(error).replace(str(folder), "layer_4"))

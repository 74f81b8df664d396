"""An evaluation as SAELens users write it, with one call exchanged: the certificate is one more group."""

import warnings

import sae_lens
from datasets import Dataset
from sae_lens import ActivationsStore
from sae_lens.evals import EvalConfig
from sae_lens.training.activation_scaler import ActivationScaler

from saelens_certify import CertifyConfig, demo, register, run_evals

warnings.simplefilter("ignore")  # SAELens's remarks about small datasets

# As before: a model, an SAE, a store over held-out text.
model = demo.load_model("HookedTransformer")
sae = demo.load_sae("layer4-topk")
texts = demo.load_texts("calibration") + demo.load_texts("evaluation")
store = ActivationsStore.from_sae(
    model, sae, Dataset.from_dict({"text": texts}), context_size=32, streaming=False
)
config = EvalConfig(batch_size_prompts=16, compute_ce_loss=True, compute_variance_metrics=True)

# New: run_evals comes from saelens_certify. Settings of the certificate are keyword arguments.
metrics, _ = run_evals(
    sae,
    store,
    model,
    ActivationScaler(),
    config,
    certify_config=CertifyConfig(permutations=1, progress=False),
    n_calibration_sequences=600,
    n_evaluation_sequences=600,
)
for group, numbers in metrics.items():
    print(group)
    shown = (
        "sharp_betting",
        "u_sae",
        "risk_base",
        "risk_pool",
        "gap",
        "kept_sae_uni",
        "eta",
        "n_seq",
    )
    for name, value in numbers.items():
        if group != "faithfulness_certificate" or name.startswith(("baseline", *shown)):
            print(f"  {name:34} {value:10.4f}")

# The same without touching the code that calls SAELens: while registered, SAELens's own function does it.
with register(n_calibration_sequences=200, n_evaluation_sequences=200):
    metrics, _ = sae_lens.run_evals(sae, store, model, ActivationScaler(), config)
print("registered:", "faithfulness_certificate" in metrics)
metrics, _ = sae_lens.run_evals(sae, store, model, ActivationScaler(), config)
print("afterwards:", "faithfulness_certificate" in metrics)

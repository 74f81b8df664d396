"""A SAELens training run that certifies its SAE on the way, without W&B."""

import warnings

import torch
from datasets import Dataset
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
)
from sae_lens.config import LoggingConfig

from saelens_certify import CertifyConfig, CertifyingEvaluator, demo

warnings.simplefilter("ignore")  # SAELens's remarks about small datasets
torch.manual_seed(0)  # SAELens does not seed its runs
model = demo.load_model("HookedTransformer")
texts = Dataset.from_dict({"text": demo.load_texts("calibration")[:2500]})

# As before: a run of SAELens. 200 steps are few; a real run has tens of thousands.
runner = LanguageModelSAETrainingRunner(
    LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=128, d_sae=512, k=16, normalize_activations="expected_average_only_in"
        ),
        model_name=demo.MODEL_NAME,
        hook_name="blocks.2.hook_resid_post",
        dataset_path="bundled passages",
        context_size=32,
        training_tokens=200 * 512,
        train_batch_size_tokens=512,
        store_batch_size_prompts=32,
        n_batches_in_buffer=32,
        n_batches_for_norm_estimate=20,
        lr=2e-3,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    ),
    override_model=model,
    override_dataset=texts,
)

# New: documents kept out of training, chosen once, and a with-block around the run.
certifying = CertifyingEvaluator(
    model=model,
    calibration=demo.load_texts("calibration")[2500:2700],
    evaluation=demo.load_texts("evaluation")[:300],
    config=CertifyConfig(progress=False),
)
with certifying.following(runner, every=50) as history:
    runner.run()

shown = ("sharp_betting", "u_sae", "gap", "eta", "pool_size")
print("step", *(f"{name:>13}" for name in shown))
for record in history:
    print(f"{record.step:4}", *(f"{record.metrics[name]:13.3f}" for name in shown))
print(certifying.certificate.verdict())

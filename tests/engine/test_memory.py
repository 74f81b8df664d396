"""No tokens x features and no tokens x vocabulary tensor anywhere: peak memory of a big batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory import cpu_allocations
from engine.builders import hooked_transformer, make_sae, make_tokens
from saelens_certify import CertifyConfig
from saelens_certify.forward import ForwardEngine
from saelens_certify.measure import Columns, calibrate, measure
from saelens_certify.saes import adapt
from saelens_certify.subject import Reader, Subject

TESTS = Path(__file__).resolve().parents[1]
N_TOKENS, D_SAE, D_VOCAB = 8192, 16384, 16384

SCRIPT = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
kind, impl, head = sys.argv[2:]
import torch
from engine.builders import hooked_transformer, make_sae
from saelens_certify import CertifyConfig
from saelens_certify.forward import ForwardEngine, Strategy
from saelens_certify.measure import calibrate, measure
from saelens_certify.proxies import variants_of
from saelens_certify.saes import adapt
from saelens_certify.subject import Reader, Subject

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(2)
model = hooked_transformer(d_vocab=16384)
sae = make_sae(kind, d_sae=16384)
tokens = torch.randint(2, 16384, (256, 32), generator=torch.Generator().manual_seed(0))
config = CertifyConfig(batch_tokens=8192, logits_mib=16, permutations=1, impl=impl, progress=False)
engine = ForwardEngine(model, Strategy(fused_head=head == "fused"))
if kind == "standard":  # about as sparse as a trained one: 0.3 % of the features
    x = engine.capture(tokens[:1], [sae.cfg.metadata.hook_name])[sae.cfg.metadata.hook_name][0]
    sae.b_enc.data -= sae.encode(x).flatten()[::7].quantile(0.997)
adapter = adapt(sae)
# Once at small size, so that libraries have allocated what they always allocate.
def work(part):
    found = calibrate(engine, {"sae": Reader(adapter, config)}, part, config)["sae"]
    subject = Subject(adapter, config, found.pool(1), variants_of(adapter, config), found.mean_activations(),
                      found.unigram_bits(0.5))
    return measure(engine, {"sae": subject}, part, config)["sae"]
work(tokens[:2])
before = peak()
columns = work(tokens)
print(json.dumps({"grown": peak() - before, "l0": float(columns["l0"].mean())}))
"""


@pytest.mark.parametrize(
    ("kind", "impl", "head"),
    [
        ("topk", "native", "logits"),
        ("topk", "native", "fused"),
        ("standard", "native", "fused"),
        ("topk", "torch", "logits"),
    ],
)
def test_peak_memory_of_a_batch_of_8192_tokens(kind: str, impl: str, head: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(TESTS), kind, impl, head],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(out.stdout.splitlines()[-1])
    dense_features, dense_logits = 4 * N_TOKENS * D_SAE, 4 * N_TOKENS * D_VOCAB
    assert 1 < found["l0"] < 2000
    assert found["grown"] < 0.25 * min(dense_features, dense_logits), found


def test_memory_does_not_grow_with_the_number_of_permutations() -> None:
    """Beyond a few of them batches are smaller: what the states of all variants take is bounded."""
    model, adapter = hooked_transformer(), adapt(make_sae())
    engine = ForwardEngine(model)
    tokens = make_tokens(64, seed=3)

    def peak(permutations: int) -> int:
        config = CertifyConfig(
            seq_len=tokens.shape[1], batch_tokens=tokens.numel(), permutations=permutations, progress=False
        )  # fmt: skip
        found = calibrate(engine, {"sae": Reader(adapter, config)}, tokens, config)["sae"]
        subject = Subject.of(adapter, found, config)
        columns: dict[str, Columns] = {}

        def work() -> None:
            columns.update(measure(engine, {"sae": subject}, tokens, config))

        allocations, _ = cpu_allocations(work)
        assert len(columns["sae"]["loss_sae"]) == len(tokens)
        assert f"loss_permuted_{permutations - 1}" in columns["sae"]
        return allocations.peak

    few, many = peak(20), peak(160)
    assert many < 1.3 * few, (few, many)
    assert few < 1.3 * 4 * peak(5), "a full batch where that is possible"

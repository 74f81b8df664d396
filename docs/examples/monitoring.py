"""Certify a bundled SAE, follow it in use, and see the stream leave what was certified."""

import sys

import torch

from saelens_certify import CertifyConfig, certify, demo
from saelens_certify.monitor import Monitor

model, sae = demo.load_model(), demo.load_sae("layer4-topk")
calibration, evaluation = demo.load_sequences("calibration"), demo.load_sequences("evaluation")

# 3,956 bundled passages: 1,200 for the certificate, the others are the requests of a service.
certificate = certify(
    model,
    sae,
    calibration=calibration.tokens[:1500],
    evaluation=evaluation.tokens[:1200],
    config=CertifyConfig(progress=False),
)
requests = evaluation.tokens[1200:1800].split(8)

# A small model: everything can be measured. Without share=, so much as costs < 5 % of a forward.
monitor = Monitor(certificate, sae, model=model, false_alarm=0.01, share=1.0, window=50)

with monitor.attached(model), torch.inference_mode():
    for tokens in requests:
        model(tokens)
print("Prose like that of the certificate:\n")
print(monitor.report(), "\n")

# The same words in random order: every token is as frequent as before.
generator = torch.Generator().manual_seed(0)
with monitor.attached(model), torch.inference_mode():
    for tokens in requests:
        order = 1 + torch.randperm(tokens.shape[1] - 1, generator=generator)
        model(torch.cat([tokens[:, :1], tokens[:, order]], dim=1))
print("Then the same words in random order:\n")
print(monitor.report())

if len(sys.argv) > 1:  # a file for the picture
    monitor.report().figure().write_image(sys.argv[1], scale=1.5)

"""``python -m saelens_certify.integrations.sae_lens``: ``python -m sae_lens.evals`` with certificates."""

import sys

from saelens_certify.integrations.sae_lens.cli import main

sys.exit(main())

"""The operators need torch and little else: a GPU machine need not have SAELens."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import sys

class Hidden:
    names = {"sae_lens", "transformer_lens", "transformers", "datasets", "plotly", "pyarrow"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
import torch
import saelens_certify
from saelens_certify import ops

codes, _ = ops.topk_encode(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4), k=2)
assert codes.indices.tolist() == [[0, 1]] * 2
assert saelens_certify.build_info()["torch"] == torch.__version__
assert not {name.split(".")[0] for name in sys.modules} & Hidden.names
"""

_PUBLIC = """
import saelens_certify

heavy = {"sae_lens", "transformer_lens"}
import sys
assert not heavy & set(sys.modules), "imported before use"
assert "certify" in dir(saelens_certify)
for name in saelens_certify.__all__:
    assert getattr(saelens_certify, name) is not None, name
# The module of the same name must not take the function's place.
import saelens_certify.build_info
import saelens_certify.manifest
assert callable(saelens_certify.build_info)
try:
    saelens_certify.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError("a name that does not exist was found")
"""


def run(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_operators_need_neither_saelens_nor_datasets():
    run(_SCRIPT)


def test_public_names_are_imported_on_first_use():
    run(_PUBLIC)

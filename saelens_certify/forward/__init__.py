"""Running the frozen model: base passes, suffixes after a patched hook, logits in chunks."""

from saelens_certify.forward.choice import choose_strategy
from saelens_certify.forward.engine import (
    BasePass,
    FinalState,
    ForwardEngine,
    Strategy,
)
from saelens_certify.forward.head import PlainHead
from saelens_certify.forward.hooks import check_hook, locate, resolve_hook

__all__ = [
    "BasePass",
    "FinalState",
    "ForwardEngine",
    "PlainHead",
    "Strategy",
    "check_hook",
    "choose_strategy",
    "locate",
    "resolve_hook",
]

"""Exit codes of the command line, and what a failure looks like on it."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from rich.console import Console

from saelens_certify.errors import CertifyError, EvidenceError

EXIT_DONE, EXIT_VACUOUS, EXIT_INPUT, EXIT_EVIDENCE, EXIT_FAILURE = 0, 1, 2, 3, 4
EXIT_INTERRUPTED = 130


def guarded(work: Callable[[], int], errors: Console) -> int:
    """Do some work; whatever fails is printed and becomes an exit code.

    Args:
        work: Returns an exit code.
        errors: Where failures are printed.

    Returns:
        The exit code.
    """
    try:
        return work()
    except EvidenceError as error:
        errors.print(
            f"evidence: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return EXIT_EVIDENCE
    except CertifyError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_INPUT
    except Exception:
        # A crash must not look like a verdict to whoever reads the exit code.
        traceback.print_exc()
        errors.print("this failure was not foreseen; evidence measured so far is kept", style="red")
        return EXIT_FAILURE

"""The hook that follows a certified SAE in use."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelens_certify.certificate import Certificate
from saelens_certify.errors import CertifyError
from saelens_certify.identity import check_sae
from saelens_certify.monitor.announce import announce, log_alarm
from saelens_certify.monitor.checks import (
    check_model,
    check_numbers,
    check_once,
    other_model,
    watched_hooks,
)
from saelens_certify.monitor.observe import Columns, Observer, Selection, evidence_values
from saelens_certify.monitor.reference import STATISTICS
from saelens_certify.monitor.report import Report
from saelens_certify.monitor.sampling import chosen, default_share, encoder_products
from saelens_certify.monitor.scope import Scope
from saelens_certify.monitor.sequential import Alarm, SequentialTest
from saelens_certify.monitor.state import State
from saelens_certify.monitor.storage import read_state, write_state
from saelens_certify.monitor.tally import Request, Sums
from saelens_certify.saes import adapt
from saelens_certify.saes.loading import load_sae

Hook = tuple[str, Callable[..., None]]

# What the current request is of each monitor. A context, not a thread: tasks of asyncio share a thread.
_SCOPES: ContextVar[dict[int, Scope]] = ContextVar("saelens_certify.monitor.scopes", default={})  # noqa: B039 - never changed in place

_LOGGER = logging.getLogger("saelens_certify.monitor")


@dataclass(frozen=True)
class _Pending:
    """A forward between the two hooks of a transcoder, or within the one of another SAE."""

    request: Request
    selection: Selection | None = None  # None: no sequence of it is measured
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    unread: bool = False  # special tokens inside it were not left out, as nobody gave the tokens


class Monitor:
    """Follows a certified SAE in use, and raises an alarm when the stream leaves what was certified.

    Each forward of the model is one request: a random sample of its sequences is encoded, and what
    the certificate's evidence says about them is tested. With probability at most ``false_alarm``
    an alarm is ever raised while the stream is like the certificate's evaluation sequences; see
    `sequential` for the statement and its proof. The first L tokens of a sequence are tested, L being
    the certificate's; shorter sequences are measured and reported but not tested, later tokens are
    counted.

    The hooks change no activation, and a failing observation breaks no forward. One monitor may
    serve many threads.

    Args:
        certificate: The certificate, or the folder of its run.
        sae: The SAE it is about: a SAELens SAE, a folder, or ``"release/sae_id"``. It is not changed.
        model: The model, to check that it has the hooks and is the certified one.
        false_alarm: Probability of ever raising a false alarm, at most.
        run_length: With a number r, a second kind of alarm (``"recent"``) watches the latest past
            only and is raised again as long as the shift lasts; it is false once in r tested
            sequences on average, or less often.
        share: Share of the sequences that are measured, in (0, 1]. None: so many that measuring
            costs less than 5 % of a forward.
        seed: Seed of the sample.
        window: Number of requests in the report's recent window.
        on_error: ``"record"``: a failing observation is counted and reported. ``"raise"``: it
            raises in the forward (to debug).
        on_alarm: Called with each new `Alarm`, in the thread that raised it; writes to the log
            ``saelens_certify.monitor`` by default, which None does too. An alarm whose callback fails
            stands in the report and is logged, and the failure is an error like others.

    Raises:
        CertifyError: If the SAE is not the certified one, the model has no such hooks, or an argument
            is of another kind or out of its range.
    """

    def __init__(
        self,
        certificate: Certificate | str | Path,
        sae: Any,
        *,
        model: Any = None,
        false_alarm: float = 0.01,
        run_length: float | None = None,
        share: float | None = None,
        seed: int = 0,
        window: int = 256,
        on_error: Literal["record", "raise"] = "record",
        on_alarm: Callable[[Alarm], None] | None = log_alarm,
    ) -> None:
        if not isinstance(certificate, Certificate):
            certificate = Certificate.load(certificate)
        check_numbers(false_alarm, run_length, share, seed, window, on_error)
        if not (on_alarm is None or callable(on_alarm)):
            raise CertifyError(f"on_alarm must be a function or None, got {on_alarm!r}")
        sae, _ = load_sae(sae, dtype=certificate.manifest["sae"]["dtype"])
        adapter = adapt(sae)
        check_sae(certificate, sae, adapter)
        self.certificate = certificate
        self.share = share or default_share(certificate.manifest, encoder_products(adapter))
        self.seed, self.window, self.on_error, self.on_alarm = seed, window, on_error, on_alarm
        self._observer = Observer.of(certificate, adapter)
        source = certificate.manifest["data"]["evaluation"]["source"]
        self._first_token: int | None = source.get("first_token")
        self._settings = {"false_alarm": false_alarm, "run_length": run_length}
        self._notes: tuple[str, ...] = ()
        if model is not None:
            watched_hooks(model, adapter)
            self._notes = other_model(certificate, model)
            for note in self._notes:
                warnings.warn(note, stacklevel=2)
        values = evidence_values(certificate)
        self._state = State(SequentialTest.start(values, false_alarm, run_length))
        self._arrived = (0, 0)  # requests, sequences
        self._attached: list[Any] = []  # models
        self._lock = threading.Lock()
        self._local = threading.local()

    @property
    def alarm(self) -> Alarm | None:
        """The alarm with the false-alarm probability, once it has been raised."""
        return next((a for a in self._state.test.alarms if a.kind == "left"), None)

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """All alarms of both kinds, oldest first."""
        return self._state.test.alarms

    def hooks(self, model: Any = None) -> list[Hook]:
        """Return ``fwd_hooks`` for any ``run_with_hooks``.

        Put them before hooks that change the activation, which they would else see changed, and only
        once: a forward that fires them twice is an error and not counted.

        Args:
            model: The model that will run: checks that it has the hooks, and finds the activation where
                an SAE is attached to it (``add_sae``). Without it, hooks of TransformerLens's names.

        Returns:
            One hook, or two for a transcoder.

        Raises:
            CertifyError: If the model has no such hook.
        """
        adapter = self._observer.adapter
        names = adapter.input_hook, adapter.output_hook
        if model is not None:
            names = watched_hooks(model, adapter)
        if adapter.input_hook == adapter.output_hook:
            return [(names[0], self._on_both)]
        return [(names[0], self._on_input), (names[1], self._on_output)]

    @contextmanager
    def attached(self, model: Any) -> Iterator[Monitor]:
        """Attach the hooks to a model for the length of a block.

        SAEs that are to be attached too (``add_sae``) come first. Attach once and serve from many
        threads inside: adding and removing hooks is not thread-safe in TransformerLens, running
        them is.

        Args:
            model: The model.

        Raises:
            CertifyError: If it has no such hooks, or the monitor is attached to it already.
        """
        check_model(model)
        hooks, before = self.hooks(model), self._state
        with self._lock:
            if any(model is other for other in self._attached):
                raise CertifyError(
                    "the monitor is attached to this model already, and would count every forward "
                    "twice; attach it once, and run all forwards in that block"
                )
            self._attached.append(model)
        try:
            with model.hooks(fwd_hooks=hooks):
                try:
                    yield self
                finally:
                    self._local.__dict__.pop("pending", None)
        finally:
            with self._lock:
                self._attached = [other for other in self._attached if other is not model]
        if self._state is before:
            _LOGGER.warning("the monitor saw no forward in the whole block: did its hooks fire?")

    @contextmanager
    def request(
        self,
        tokens: Int[Tensor, "batch pos"] | Sequence[Sequence[int]] | None = None,
        attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        continuation: bool = False,
    ) -> Iterator[None]:
        """Say what the forwards of this thread or asyncio task belong to, for the length of a block.

        The first forward of the block is the request, later ones continue it (generation): they
        are counted, not tested. Without a block every forward of more than one position is a
        request of its own, and every position counts.

        Args:
            tokens: Token ids [batch, pos] of the first forward: special tokens are then left out as certified,
                and sequences that do not begin as the certified ones are counted.
            attention_mask: 1 at real positions, 0 at padding (on either side).
            continuation: Whether already the first forward continues an earlier request.

        Raises:
            CertifyError: If one is no tensor and cannot be made one (rows of unequal length), a shape
                is not [batch, pos], or the two differ.
        """
        scope = Scope.of(tokens, attention_mask, continuation)
        outer = _SCOPES.get()
        _SCOPES.set({**outer, id(self): scope})
        try:
            yield
        finally:
            _SCOPES.set(outer)
            self._local.__dict__.pop("pending", None)

    def report(self) -> Report:
        """Return what has been seen so far; later requests do not change it."""
        return Report(self.certificate, self._state, self._settings, self.share, self._notes)

    def reset(self) -> None:
        """Begin a new test, after an alarm was dealt with; counts and history begin anew too.

        The reference's half of the false-alarm probability is spent once, the stream's in each
        period: over k periods it is (k + 1) / 2 times ``false_alarm`` at most.
        """
        with self._lock:
            self._state = State(self._state.test.restarted())

    def save(self, path: str | Path) -> None:
        """Write the state as JSON: a restarted service goes on with the same guarantee.

        Args:
            path: The file; its folder is made if missing.

        Raises:
            CertifyError: If that cannot be a file.
        """
        with self._lock:
            state, arrived = self._state, self._arrived
        write_state(path, self.certificate, self._test_settings(), state, arrived)

    def restore(self, path: str | Path) -> None:
        """Go on from a saved state.

        Raises:
            CertifyError: If it was saved for another certificate or other settings, or is damaged.
        """
        with self._lock:
            self._state, self._arrived = read_state(
                path, self.certificate, self._test_settings(), self._state
            )

    def _test_settings(self) -> dict[str, Any]:
        return {**self._settings, "share": self.share, "seed": self.seed}

    def _on_both(self, activation: Tensor, hook: Any) -> None:
        self._guarded(
            hook, self._on_both, lambda: self._begin(activation) and self._finish(activation)
        )

    def _on_input(self, activation: Tensor, hook: Any) -> None:
        if not self._guarded(hook, self._on_input, lambda: self._begin(activation)):
            self._local.pending = None  # then the output hook's having nothing is no second error

    def _on_output(self, activation: Tensor, hook: Any) -> None:
        self._guarded(hook, self._on_output, lambda: self._finish(activation))

    def _guarded(
        self, point: Any, mine: Callable[..., None], observe: Callable[[], object]
    ) -> bool:
        """Run an observation; whatever fails in it stays out of the forward.

        Args:
            point: The hook point that fired.
            mine: The hook that it fired.
            observe: The observation.

        Returns:
            Whether it did not fail.
        """
        if self._local.__dict__.get("busy"):  # an SAE that fires its own hooks as it encodes
            return True
        self._local.busy = True
        try:
            check_once(point, mine)
            observe()
        except Exception as error:
            self._local.__dict__.pop("pending", None)
            with self._lock:
                self._state = self._state.failed(f"{type(error).__name__}: {error}")
            if self.on_error == "raise":
                raise
            return False
        finally:
            self._local.busy = False
        return True

    def _begin(self, activation: Tensor) -> bool:
        """Take what is needed of a forward at the input hook; return whether there is anything."""
        self._local.__dict__.pop("pending", None)  # of a forward that did not reach the output hook
        shape = n, n_positions = int(activation.shape[0]), int(activation.shape[1])
        given = _SCOPES.get().get(id(self))
        # Outside of any request, a forward of one position is a step of generation with a cache.
        first = given.forwards == 0 if given else n_positions > 1
        if given:
            given.forwards += 1
        if not first:
            self._local.pending = None
            with self._lock:
                self._state = self._state.continued(n * n_positions)
            return False
        scope = given or Scope()
        scope.check_shape(shape)
        with self._lock:
            number, start = self._arrived
            self._arrived = (number + 1, start + n)
        lengths = scope.lengths(shape)
        request = Request(
            number=number,
            sequences=n,
            tokens=int(lengths.sum()),
            late_tokens=int((lengths - self._observer.seq_len).clamp(min=0).sum()),
            without_bos=scope.without(self._first_token),
        )
        rows = chosen(self.seed, start, n, self.share)
        if not len(rows):
            self._local.pending = _Pending(request)
            return True
        selection = self._observer.select(rows, n_positions, scope.tokens, scope.mask)
        unread = scope.tokens is None and self._observer.needs_tokens
        self._local.pending = _Pending(request, selection, selection.take(activation), unread)
        return True

    def _finish(self, activation: Tensor) -> None:
        """Measure at the output hook, test, and swap the state."""
        if "pending" not in self._local.__dict__:
            raise CertifyError(
                f"hook {self._observer.adapter.input_hook!r}, which the transcoder reads, did not fire "
                f"before {self._observer.adapter.output_hook!r}"
            )
        pending: _Pending | None = self._local.__dict__.pop("pending")
        if pending is None:
            return
        request, values = pending.request, np.empty((0, len(STATISTICS)))
        if pending.selection is not None:
            columns = self._measure(pending.selection, pending.x, activation)
            complete = pending.selection.complete
            values = columns.values[complete]
            tested = Sums.of(columns, complete)
            unread = tested.sequences if pending.unread else 0
            request = dataclasses.replace(
                request, tested=tested, short=Sums.of(columns, ~complete), unread=unread
            )
        with self._lock:
            before = self._state.test.alarms
            self._state = self._state.after(request, values, time.time(), self.window)
            raised = [alarm for alarm in self._state.test.alarms if alarm not in before]
        announce(raised, self.on_alarm)

    @torch.no_grad()
    def _measure(self, selection: Selection, x: Tensor, activation: Tensor) -> Columns:
        y = selection.take(activation)
        with ExitStack() as off:
            for device in {y.device.type, self._observer.adapter.device.type}:
                off.enter_context(torch.autocast(device, enabled=False))
            return self._observer.measure(selection, x, y)

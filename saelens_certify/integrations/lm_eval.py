"""M, S∘M and h_G as models of EleutherAI's lm-evaluation-harness (``lm_eval``).

The harness keeps its own tasks, prompts, metrics and rules of scoring; here it only finds the
log-probabilities that it asks for. Whatever one of the three models is asked first is measured for all
three in one pass (`ScoreStore`).
"""

from __future__ import annotations

import contextlib
import difflib
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelens_certify.data.tokenise import bos_to_prepend, known_bos, tokenise
from saelens_certify.errors import CertifyError
from saelens_certify.integrations.scored_requests import PROXIES, Request, ScoreStore

try:
    from lm_eval import evaluator, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import Task
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise CertifyError(
        f"downstream tasks need EleutherAI's lm-evaluation-harness ({error}); install it with "
        "pip install 'saelens_certify[lm-eval]'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_ANSWERED = ("multiple_choice", "loglikelihood")


class ProxyLM(TemplateLM):
    """One of M, S∘M and h_G as the harness sees it.

    Texts become tokens as the harness does it for Hugging Face models: context and continuation are
    tokenised together, spaces at the end of the context belong to the continuation, an empty context is
    the BOS token (EOS where there is none). Whether BOS comes first is the model's convention
    (``cfg.default_prepend_bos``). No pads are ever fed.

    A request longer than the model's context of n_ctx tokens loses tokens on the left, BOS among them,
    as in the harness. The harness feeds all tokens but the last, here the last is fed, too: a request that is
    too long keeps one token of context less. `cut` counts such requests.

    Args:
        model: The TransformerLens model that the store measures; its tokenizer and context are used.
        store: Scores of requests under all proxies.
        proxy: ``"base"``, ``"sae"`` or ``"pool"``.

    Raises:
        CertifyError: If the model has no tokenizer, or one without BOS and EOS.
    """

    def __init__(self, model: Any, store: ScoreStore, proxy: str) -> None:
        super().__init__()
        if proxy not in PROXIES:
            raise CertifyError(f"proxy {proxy!r} is unknown; use one of {PROXIES}")
        self.tokenizer: Any = getattr(model, "tokenizer", None)
        if self.tokenizer is None:
            raise CertifyError(
                "the model has no tokenizer, and tasks are texts; load it with one, or call "
                "model.set_tokenizer(tokenizer)"
            )
        self.proxy = proxy
        self.store = store
        self.asked: dict[tuple[str, str], Request] = {}
        self._n_ctx = int(model.cfg.n_ctx)
        bos = known_bos(self.tokenizer, None)
        convention = getattr(model.cfg, "default_prepend_bos", None)
        self._bos = bos_to_prepend(self.tokenizer, convention, bos)
        prefix = bos if bos is not None else getattr(self.tokenizer, "eos_token_id", None)
        if prefix is None:
            raise CertifyError(
                "the tokenizer has neither BOS nor EOS, so a text without context has no first token; set "
                "tokenizer.bos_token"
            )
        self._prefix = int(prefix)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token; the first token of a text without context, where there is none."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return self._prefix if eos is None else int(eos)

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty context: BOS, or EOS where there is none."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Largest number of tokens from which one more is predicted: n_ctx - 1, as the last is fed, too."""
        return self._n_ctx - 1

    @property
    def cut(self) -> int:
        """Number of distinct texts asked for that were longer than the model's context."""
        return sum(request.n_cut > 0 for request in self.asked.values())

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **kwargs: Any,  # noqa: ARG002 - the harness's signature
    ) -> list[int]:
        """Tokenise a text.

        Args:
            string: The text; one that spells out BOS is not given a second one.
            add_special_tokens: Whether BOS comes first; None: by the model's convention.
            **kwargs: Not used.
        """
        bos = None if add_special_tokens is False else self._bos
        return tokenise(self.tokenizer, [string], bos)[0].tolist()

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation given its context, and whether it is the greedy one.

        Raises:
            CertifyError: If a continuation is empty, or fills the model's context.
        """
        for request in requests:
            texts: Any = request.args
            if not texts[1]:
                raise _no_continuation(*texts[:2])
        quiet = disable_tqdm or not self.store.progress
        return super().loglikelihood(requests, disable_tqdm=quiet)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,  # noqa: ARG002 - the harness's signature
        **kwargs: Any,  # noqa: ARG002 - the harness's signature
    ) -> list[tuple[float, bool]]:
        cut = self.cut
        asked = [self._request(*request) for request in requests]
        for (texts, _, _), request in zip(requests, asked, strict=True):
            self.asked[texts] = request
        if self.cut > cut:
            warnings.warn(
                f"{self.cut - cut} of {len(asked)} requests are longer than the model's context of "
                f"{self._n_ctx} tokens: the first tokens of their contexts, BOS among them, are left out",
                stacklevel=2,
            )
        return self._answers(asked)

    def loglikelihood_rolling(
        self,
        requests: list[Instance],
        disable_tqdm: bool = False,  # noqa: ARG002 - the harness's signature
    ) -> list[float]:
        """Log-probability of each whole text.

        The harness's own rule for texts longer than the model's context: windows in which each token is
        predicted once, from as many tokens before it as fit; the first token from the prefix token. Each text
        is scored by itself.
        """
        windows: list[Request] = []
        numbers: list[int] = []
        for instance in requests:
            text = instance.args[0]
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in rolling]
            windows += [self._request((text, text), *pair) for pair in pairs]
            numbers.append(len(pairs))
        answers = iter(self._answers(windows))
        return [sum(next(answers)[0] for _ in range(number)) for number in numbers]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Refuse: texts are scored, not generated.

        Raises:
            CertifyError: Always.
        """
        raise generation_refused("this task")

    def _request(
        self, texts: tuple[str, str], context: Sequence[int], continuation: Sequence[int]
    ) -> Request:
        if not context or not continuation:
            raise _no_continuation(*texts)
        if len(continuation) >= self._n_ctx:
            raise CertifyError(
                f"a continuation of {len(continuation)} tokens ({texts[1][:40]!r}…) does not fit the model's "
                f"context of {self._n_ctx} tokens with one token before it; leave such questions out of the task"
            )
        tokens = (*context, *continuation)
        kept = tokens[-self._n_ctx :]
        return Request(kept, len(continuation), len(tokens) - len(kept))

    def _answers(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        scores = self.store.score(requests)
        return [(score.logprob[self.proxy], score.greedy[self.proxy]) for score in scores]


def generation_refused(task: str) -> CertifyError:
    """Return the error about a task that wants generated text."""
    return CertifyError(
        f"{task} is of type 'generate_until': it wants generated text, and proxies are scored on given texts "
        "only; choose a task of type 'multiple_choice', 'loglikelihood' or 'loglikelihood_rolling' (many have "
        "a multiple-choice form)"
    )


def _no_continuation(context: str, continuation: str) -> CertifyError:
    return CertifyError(
        f"nothing can be scored of the continuation {continuation[:40]!r} after {context[-40:]!r}: one of the two "
        "has no tokens of its own; give the task's doc_to_text and doc_to_choice texts that do not end up "
        "empty, with a space between them (target_delimiter)"
    )


def proxy_models(model: Any, store: ScoreStore) -> dict[str, ProxyLM]:
    """Return M, S∘M and h_G for ``lm_eval.simple_evaluate(model=...)``.

    Args:
        model: The TransformerLens model that the store measures.
        store: What `proxy_scores` returned for that model.

    Returns:
        By name: ``"base"``, ``"sae"``, ``"pool"``. They share the store: what one of them was asked costs the
        others nothing.
    """
    return {proxy: ProxyLM(model, store, proxy) for proxy in PROXIES}


def load_tasks(
    tasks: Sequence[str | Path | Mapping[str, Any]],
    metric: str,
    *,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
) -> dict[str, Task]:
    """Load the harness's tasks and check that what they ask can be answered.

    Args:
        tasks: Names of tasks, groups or tags of the harness or of ``include_path``, paths of YAML files, or
            whole configurations (``{"task": name, "dataset_path": ..., ...}``).
        metric: The metric that is wanted of each.
        num_fewshot: Examples in each prompt, unless a task itself says none; None: as the task says, else none.
        include_path: A folder of further task files.

    Returns:
        The single tasks, by name; a group gives all of its tasks.

    Raises:
        CertifyError: If a name is unknown, its data cannot be read, it wants generated text, or it does not
            have the metric.
    """
    if isinstance(tasks, (str, Path, Mapping)) or not tasks:
        raise CertifyError(f"tasks must be a list of at least one task, got {tasks!r}")
    if include_path is not None and not Path(include_path).is_dir():
        raise CertifyError(
            f"include_path {str(include_path)!r} is no folder; give one with the tasks' YAML files"
        )
    manager = _manager(tasks, include_path)
    found: dict[str, Task] = {}
    for task in tasks:
        for name, loaded in _load(manager, task).items():
            _check_task(name, loaded, metric)
            of_task = loaded.get_config("num_fewshot")
            if of_task is None or (of_task != 0 and num_fewshot is not None):
                loaded.set_config("num_fewshot", num_fewshot or 0)
            found[name] = loaded
    return found


def answer(
    model: ProxyLM, tasks: Mapping[str, Task], limit: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Let the harness evaluate a model and return what it logs of each question.

    Seeds are those of the harness's own command, so that every model gets the same prompts as there. Python's
    and NumPy's global generators are left as they were.

    Args:
        model: The model.
        tasks: What `load_tasks` returned.
        limit: Only the first so many questions of each task.

    Returns:
        For each task the harness's samples, one per question (of the first filter), in its order.
    """
    with _seeded():
        for task in tasks.values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        results: Any = evaluator.evaluate(
            lm=model,
            task_dict={"tasks": dict(tasks)},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = results["samples"]
    return {
        name: [each for each in samples[name] if each["filter"] == samples[name][0]["filter"]]
        for name in tasks
    }


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seed what tasks draw from as the harness's command does, and leave it as it was."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - tasks draw from these
    try:
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _manager(
    tasks: Sequence[str | Path | Mapping[str, Any]], include_path: str | Path | None
) -> TaskManager:
    """The index of the tasks; the harness's own thousands are read only if they are needed."""
    folder = None if include_path is None else str(include_path)
    own = TaskManager(include_path=folder, include_defaults=False)
    alone = [
        "group" not in task if isinstance(task, Mapping) else task in own.all_subtasks
        for task in tasks
    ]
    return own if all(alone) else TaskManager(include_path=folder)


def _load(manager: TaskManager, task: str | Path | Mapping[str, Any]) -> dict[str, Task]:
    spec: Any = dict(task) if isinstance(task, Mapping) else str(task)
    if isinstance(spec, str) and spec not in manager.all_tasks and not Path(spec).is_file():
        near = difflib.get_close_matches(spec, manager.all_tasks)
        raise CertifyError(
            f"the harness has no task {spec!r}{f' (like it: {near})' if near else ''}; give one of its names, a "
            "YAML file, or the folder of your own tasks as include_path"
        )
    try:
        with _seeded():
            return manager.load([spec])["tasks"]
    except Exception as error:  # The harness and datasets raise whatever they meet.
        raise CertifyError(
            f"task {spec!r} cannot be loaded ({type(error).__name__}: {error}). Its data come from the hub unless "
            "they are cached; for local files give a task with dataset_path: json and dataset_kwargs: "
            "{data_files: ...}"
        ) from error


def _check_task(name: str, task: Task, metric: str) -> None:
    kind = task.OUTPUT_TYPE
    if kind == "generate_until":
        raise generation_refused(f"task {name!r}")
    if kind not in _ANSWERED:
        raise CertifyError(
            f"task {name!r} is of type {kind!r}, which has no questions to be right or wrong about; choose tasks "
            f"of type {_ANSWERED}, or hand proxy_models(...) to lm_eval.simple_evaluate"
        )
    metrics = sorted(task.aggregation() or ())
    if metric not in metrics:
        raise CertifyError(f"task {name!r} has no metric {metric!r}; it has {metrics}")

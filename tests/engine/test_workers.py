"""Runs on Ray workers: the same certificate, whatever happens to a worker."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.builders import (
    SEQ_LEN,
    hooked_transformer,
    llama_bridge,
    make_sae,
    make_tokens,
)
from saelens_certify import CertifyConfig, CertifyError, certify, passes, verify
from saelens_certify.certification import read_sides
from saelens_certify.forward import ForwardEngine
from saelens_certify.study import Setting, View, certify_many
from saelens_certify.workers import RayWorkers, ThisProcess, _processors_each, workers_for

MODELS = {"hooked": hooked_transformer, "bridge": llama_bridge}
CONFIG = CertifyConfig(
    seq_len=SEQ_LEN, coding="topk:6", tau=2, permutations=1, random_decoders=1, error_permutations=3,
    part_sequences=8, progress=False,
)  # fmt: skip
ON_RAY = dataclasses.replace(CONFIG, workers=2)
CALIBRATION, EVALUATION = make_tokens(24, seed=1), make_tokens(50, seed=2)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests; it has two processors even where the machine has fewer."""
    import ray

    # Functions of this file are found by the workers; the package itself they find as users' workers do.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


def issued(model, config: CertifyConfig, output: Path | None = None):
    return certify(
        model,
        make_sae(),
        calibration=CALIBRATION,
        evaluation=EVALUATION,
        config=config,
        output=output,
    )


@pytest.mark.parametrize("name", MODELS)
def test_certificates_do_not_depend_on_workers(name, tmp_path) -> None:
    here, there = issued(MODELS[name](), CONFIG), issued(MODELS[name](), ON_RAY, tmp_path / "run")
    assert there.evidence.equals(here.evidence)
    assert torch.equal(there.calibration.counts, here.calibration.counts)
    assert there.bounds["u_sae"].value == here.bounds["u_sae"].value
    assert there.manifest["identity"] == here.manifest["identity"]
    verify(tmp_path / "run")


def test_a_model_that_was_asked_for_hidden_states_can_be_sent() -> None:
    model = copy.deepcopy(llama_bridge())
    model.original_model(EVALUATION[:1], output_hidden_states=True)
    assert issued(model, ON_RAY).evidence.equals(issued(model, CONFIG).evidence)


def test_a_run_goes_on_with_other_workers(tmp_path, monkeypatch) -> None:
    expected = issued(hooked_transformer(), CONFIG)
    real, measured = passes.measure, []

    def dies(*arguments, **keywords):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*arguments, **keywords)

    with monkeypatch.context() as context:
        context.setattr(passes, "measure", dies)
        with pytest.raises(KeyboardInterrupt):
            issued(hooked_transformer(), CONFIG, tmp_path)
    assert issued(hooked_transformer(), ON_RAY, tmp_path).evidence.equals(expected.evidence)


def test_studies_do_not_depend_on_workers(tmp_path) -> None:
    model = hooked_transformer()
    calibration, evaluation = read_sides(model, CALIBRATION, EVALUATION, CONFIG)

    def study(config: CertifyConfig, output: Path | None = None):
        base = Setting(make_sae(), View(calibration), View(evaluation), config)
        late = dataclasses.replace(base, sae=make_sae("standard", "blocks.2.hook_resid_pre"))
        fewer = dataclasses.replace(base, calibration=View(calibration, first=18))
        return certify_many(model, {"base": base, "late": late, "fewer": fewer}, output=output)

    here, there = study(CONFIG), study(ON_RAY, tmp_path)
    for name, certificate in here.items():
        assert there[name].evidence.equals(certificate.evidence)
        assert torch.equal(there[name].calibration.counts, certificate.calibration.counts)
        verify(tmp_path / name)


def test_a_run_that_may_stop_stops_at_the_same_place() -> None:
    until = {"until": "decided", "alpha": 0.9}
    here = issued(hooked_transformer(), dataclasses.replace(CONFIG, **until))
    there = issued(hooked_transformer(), dataclasses.replace(ON_RAY, **until))
    assert there.evidence.equals(here.evidence)
    assert here.stop == there.stop


def _late(_engine, delays, index):
    time.sleep(delays[index])
    return index, os.getpid()


def _dies_once(_engine, marker, index):
    if index == 1 and not marker.exists():
        marker.touch()
        os._exit(1)
    return index


def _dies(_engine, index):
    if index == 1:
        os._exit(1)
    return index


def _refuses(_engine, index):
    raise CertifyError(f"part {index} is wrong")


def _threads(_engine, _):
    return torch.get_num_threads()


@pytest.fixture(scope="class")
def workers():
    """Two of them, who share what processors there are."""
    found = RayWorkers(ForwardEngine(hooked_transformer()), 2)
    yield found
    found.stop()


class TestWorkersThatLive:
    def test_results_come_in_order_from_several_processes(self, workers) -> None:
        delays = [0.5, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0]
        found = list(workers.in_order(_late, (delays,), [(i,) for i in range(7)]))
        assert [index for index, _ in found] == list(range(7))
        processes = {process for _, process in found}
        assert len(processes) == 2
        assert os.getpid() not in processes

    def test_errors_are_those_of_the_function(self, workers) -> None:
        with pytest.raises(CertifyError, match="part 0 is wrong"):
            list(workers.in_order(_refuses, (), [(0,)]))

    def test_they_share_the_processors(self, workers) -> None:
        assert list(workers.in_order(_threads, (), [(0,), (1,)])) == [1, 1]

    def test_what_cannot_be_sent_is_refused(self, workers) -> None:
        with pytest.raises(CertifyError, match="cannot be sent to a worker .*frame.*workers=0"):
            list(workers.in_order(_refuses, (sys._getframe(),), [(0,)]))


class TestWorkersThatDie:
    def test_one_that_dies_is_replaced(self, workers, tmp_path) -> None:
        tasks = [(i,) for i in range(5)]
        assert list(workers.in_order(_dies_once, (tmp_path / "died",), tasks)) == list(range(5))
        assert (tmp_path / "died").exists()

    def test_a_task_that_kills_every_worker_is_an_error(self, workers) -> None:
        with pytest.raises(CertifyError, match="a worker died 3 times.*lower workers"):
            list(workers.in_order(_dies, (), [(i,) for i in range(3)]))


def test_too_many_workers_are_refused_before_any_work() -> None:
    with pytest.raises(CertifyError, match="workers = 3 and the Ray cluster has a processor for 2"):
        issued(hooked_transformer(), dataclasses.replace(CONFIG, workers=3))


def test_nothing_to_do_starts_nobody(tmp_path) -> None:
    first = issued(hooked_transformer(), CONFIG, tmp_path)
    # Three workers do not fit, which nobody notices if there is nothing left to do.
    again = issued(hooked_transformer(), dataclasses.replace(CONFIG, workers=3), tmp_path)
    assert again.evidence.equals(first.evidence)


def test_a_model_on_a_device_of_its_own_is_refused() -> None:
    model = copy.deepcopy(hooked_transformer())
    model.ln_final.register_parameter("elsewhere", torch.nn.Parameter(torch.ones(1, device="meta")))
    with pytest.raises(CertifyError, match="the model is on cpu, meta.*workers=0"):
        RayWorkers(ForwardEngine(model), 2)


def test_ray_is_asked_for_by_name(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CertifyError, match=r"saelens_certify\[ray\]"):
        issued(hooked_transformer(), ON_RAY)


def test_without_workers_tasks_run_here_when_they_are_asked_for() -> None:
    with workers_for(ForwardEngine(hooked_transformer()), CONFIG) as workers:
        assert isinstance(workers, ThisProcess)
        results = workers.in_order(_late, ([0.0, 60.0],), [(0,), (1,)])
        assert next(results) == (0, os.getpid())


@given(
    nodes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), max_size=4),
    n_workers=st.integers(1, 12),
    gpus=st.integers(0, 1),
)
def test_workers_fit_on_the_machines(nodes, n_workers, gpus) -> None:
    resources = [{"CPU": float(cpus), "GPU": float(have)} for cpus, have in nodes]

    def placed(cpus: int) -> int:
        """Put workers on machines one at a time."""
        free, count = [list(node) for node in nodes], 0
        for node in free:
            while node[0] >= cpus and node[1] >= gpus:
                node[0] -= cpus
                node[1] -= gpus
                count += 1
        return count

    if placed(1) < n_workers:
        with pytest.raises(CertifyError, match=f"workers = {n_workers}"):
            _processors_each(resources, n_workers, gpus)
    else:
        each = _processors_each(resources, n_workers, gpus)
        assert placed(each) >= n_workers
        assert placed(each + 1) < n_workers

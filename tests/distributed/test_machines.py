"""Machines meet before their ranks start; here each is a thread with a connection to the same store."""

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from sft_recipe.config.trainer import TrainerConfig
from sft_recipe.distributed import machines
from sft_recipe.distributed.rendezvous import FIRST_ATTEMPT
from sft_recipe.errors import ConfigError, PreflightError


@pytest.fixture
def port(monkeypatch):
    """Return a free port; forget the environment of an attempt."""
    monkeypatch.setattr(machines, "POLL_S", 0.02)
    monkeypatch.setattr(machines, "LINGER_S", 0.2)
    monkeypatch.setenv(FIRST_ATTEMPT, "0")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def machine(node_rank, **changes):
    values = {"nnodes": 2, "node_rank": node_rank, "master_addr": "127.0.0.1", "start_timeout": 60, **changes}
    return TrainerConfig.model_validate(values)


def meet(port, *trainers):
    """Return what each machine's `meet` returned or raised."""

    def one(trainer):
        try:
            return machines.meet(trainer, port)
        except (ConfigError, PreflightError) as error:
            return error

    with ThreadPoolExecutor(len(trainers)) as pool:
        return list(pool.map(one, trainers))


def test_machines_meet(port, capsys):
    first, second = meet(port, machine(0), machine(1))
    assert json.loads(first.get("machine/1"))["host"] == json.loads(second.get("machine/0"))["host"]


def test_missing_machine_is_named(port, capsys):
    (error,) = meet(port, machine(0, nnodes=3, start_timeout=0.3))
    assert isinstance(error, PreflightError)
    assert f"2 of 3 machines (NODE_RANK=1, 2) at 127.0.0.1:{port}" in str(error)
    assert capsys.readouterr().err == f"waiting for 2 of 3 machines (NODE_RANK=1, 2) at 127.0.0.1:{port}\n"


def test_missing_machine_0_is_named(port, capsys):
    (error,) = meet(port, machine(1, start_timeout=0.3))
    assert isinstance(error, PreflightError)
    assert f"for machine 0 at 127.0.0.1:{port}" in str(error)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (machine(0), "two machines have NODE_RANK=0"),
        (machine(1, n_gpus_per_node=2), "N_GPUS is"),
        (machine(1, nnodes=3), "NNODES is"),
    ],
)
def test_machines_that_do_not_fit_all_end_with_the_reason(port, second, message):
    errors = meet(port, machine(0, nnodes=2), second)
    assert [type(error) for error in errors] == [ConfigError, ConfigError]
    assert message in str(errors[0])
    assert str(errors[0]) == str(errors[1])


def test_failure_of_a_machine_ends_the_waiting_of_the_others(port):
    trainer = machine(0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(machines.meet, trainer, port)
        while not machines._is_reachable("127.0.0.1", port):
            pass
        machines.report_failure(machine(1), port, "nodeb: no interface")
        with pytest.raises(ConfigError, match="nodeb: no interface"):
            first.result()


def test_machine_that_is_started_again_joins_the_next_attempt(port, monkeypatch):
    """Its predecessor's ranks belonged to attempt 0; those of machine 0 have been restarted once since."""
    first, _ = meet(port, machine(0), machine(1))
    gone = json.loads(first.get("machine/1")) | {"process": 2**22 + 1}
    first.set("machine/1", json.dumps(gone))
    first.set("attempt/0", "0")
    first.set("attempt/1", "0")
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(machines.meet, machine(1), port)
        with pytest.raises(TimeoutError):
            again.result(timeout=0.5)
        first.set("attempt/0", "1")
        again.result(timeout=30)
    assert os.environ[FIRST_ATTEMPT] == "1"

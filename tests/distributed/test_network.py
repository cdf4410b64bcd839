"""The interface of several machines: that of the route to machine 0; wrong names end in one message."""

import socket

import psutil
import pytest

from sft_recipe.distributed import network
from sft_recipe.errors import ConfigError


@pytest.fixture(autouse=True)
def interfaces(monkeypatch):
    """One interface to the outside, beside the loopback interface; the route leads to it."""
    address = type("Address", (), {})

    def of(family, text):
        found = address()
        found.family, found.address = family, text
        return found

    machine = {
        "lo": [of(socket.AF_INET, "127.0.0.1"), of(socket.AF_INET6, "::1")],
        "eth0": [of(socket.AF_INET, "10.0.0.5"), of(socket.AF_INET6, "fe80::1%eth0")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: machine)
    for name in (network.GLOO, network.NCCL):
        monkeypatch.delenv(name, raising=False)
    return machine


def test_interface_is_that_of_the_route(monkeypatch):
    monkeypatch.setattr(network, "_local_address", lambda target: "10.0.0.5")
    network.choose_interface("10.0.0.1", 29500, is_master=False)
    assert (network.os.environ[network.GLOO], network.os.environ[network.NCCL]) == ("eth0", "eth0")


def test_named_interface_is_kept(monkeypatch):
    monkeypatch.setattr(network, "_local_address", lambda target: "10.0.0.5")
    monkeypatch.setenv(network.NCCL, "=eth0")
    network.choose_interface("10.0.0.1", 29500, is_master=False)
    assert (network.os.environ[network.GLOO], network.os.environ[network.NCCL]) == ("eth0", "=eth0")


@pytest.fixture
def loopback_name(monkeypatch):
    """A hostname that is a loopback address, as on Debian."""
    resolve = network._resolve
    monkeypatch.setattr(network, "_resolve", lambda name, port: resolve("127.0.1.1" if name == "node" else name, port))
    return "node"


def test_machine_0_whose_name_is_a_loopback_address_uses_its_only_interface(interfaces, loopback_name):
    network.choose_interface(loopback_name, 29500, is_master=True)
    assert network.os.environ[network.GLOO] == "eth0"
    interfaces["eth1"] = interfaces["eth0"]
    for name in (network.GLOO, network.NCCL):
        del network.os.environ[name]
    with pytest.raises(ConfigError, match="its interfaces are eth0, eth1: give the IP address of machine 0"):
        network.choose_interface(loopback_name, 29500, is_master=True)


def test_other_machine_does_not_reach_machine_0_by_its_own_loopback_name(loopback_name):
    with pytest.raises(ConfigError, match="MASTER_ADDR=node is this machine itself"):
        network.choose_interface(loopback_name, 29500, is_master=False)


@pytest.mark.parametrize("is_master", [True, False])
def test_launchers_on_one_machine_meet_at_its_loopback_address(is_master):
    network.choose_interface("127.0.0.1", 29500, is_master)
    assert network.os.environ[network.GLOO] == "lo"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (network.GLOO, "eth9", "this machine has no interface eth9"),
        (network.GLOO, "eth0,ib0", "this machine has no interface ib0"),
        (network.GLOO, "eth", "this machine has no interface eth"),
        (network.GLOO, "lo", "does not reach other machines"),
        (network.NCCL, "ib", "this machine has no interface ib"),
        (network.NCCL, "=lo", "does not reach other machines"),
    ],
)
def test_wrong_interface_is_one_message(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        network.choose_interface("10.0.0.1", 29500, is_master=True)


def test_nccls_prefixes_are_accepted(monkeypatch):
    monkeypatch.setenv(network.GLOO, "eth0")
    for value in ("eth", "^lo,docker", "=eth0"):
        monkeypatch.setenv(network.NCCL, value)
        network.choose_interface("10.0.0.1", 29500, is_master=True)


def test_address_that_does_not_resolve_is_one_message():
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=nobody\.invalid cannot be resolved"):
        network.choose_interface("nobody.invalid", 29500, is_master=False)

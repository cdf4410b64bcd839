"""The network interface through which the ranks of several machines reach each other."""

import os
import socket
from ipaddress import ip_address

from sft_recipe.errors import ConfigError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
NAME_BOTH = f"set {GLOO} and {NCCL} to the interface that reaches the other machines"


def choose_interface(master_addr: str, port: int, is_master: bool) -> None:
    """Let gloo and NCCL use the interface of the route to machine 0, unless their variables name another one.

    Otherwise gloo binds to what the hostname resolves to, which on Debian is a loopback address. Raises ConfigError
    for an address that does not resolve or is this machine itself, and for interfaces that do not exist.
    """
    interfaces = _interfaces()
    _check_named(interfaces)
    if GLOO in os.environ and NCCL in os.environ:
        return
    local = _local_address(_resolve(master_addr, port))
    if ip_address(local).is_loopback and not _is_address(master_addr):
        if not is_master:
            raise ConfigError(
                f"MASTER_ADDR={master_addr} is this machine itself ({local}), but NODE_RANK is not 0: give the address "
                "of machine 0 in the network of the machines, the same on all of them"
            )
        name = _only_interface(master_addr, local, interfaces)
    else:
        # A loopback address that is given as such: all "machines" are launchers on this one.
        name = next((name for name, addresses in interfaces.items() if local in addresses), "lo")
    os.environ.setdefault(GLOO, name)
    os.environ.setdefault(NCCL, name)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def own_addresses() -> list[str]:
    """Return the addresses at which other machines may reach this one."""
    return [text for texts in _interfaces().values() for text in texts if not ip_address(text).is_loopback]


def _interfaces() -> dict[str, list[str]]:
    """Return the addresses of each network interface of this machine, IPv6 addresses without their zone."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [address.address.partition("%")[0] for address in addresses if address.family in families]
        for name, addresses in psutil.net_if_addrs().items()
    }


def _check_named(interfaces: dict[str, list[str]]) -> None:
    """NCCL's variable is a list of prefixes, with ^ of those to avoid; gloo's a list of names."""
    gloo = [name for name in os.environ.get(GLOO, "").split(",") if name]
    nccl = os.environ.get(NCCL, "")
    prefixes = [] if nccl.startswith("^") else [name for name in nccl.lstrip("=").split(",") if name]
    there = ", ".join(interfaces)
    for variable, names in ((GLOO, gloo), (NCCL, prefixes)):
        for name in names:
            fits = [other for other in interfaces if other == name or (variable == NCCL and other.startswith(name))]
            if not fits:
                raise ConfigError(f"{variable}={os.environ[variable]}: this machine has no interface {name} ({there})")
            if all(ip_address(address).is_loopback for other in fits for address in interfaces[other]):
                raise ConfigError(
                    f"{variable}={os.environ[variable]} does not reach other machines; this one has {there}"
                )


def _resolve(master_addr: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        family, *_, address = socket.getaddrinfo(master_addr, port, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={master_addr} cannot be resolved on {socket.gethostname()} ({error.strerror or error}): give "
            "the IP address of machine 0, or add its name to /etc/hosts"
        ) from None
    return family, address  # type: ignore[return-value]


def _local_address(target: tuple[socket.AddressFamily, tuple[str, int]]) -> str:
    """Return this machine's address on the route to `target`; connecting a UDP socket sends nothing."""
    family, address = target
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)
        except OSError as error:
            raise ConfigError(
                f"there is no route from {socket.gethostname()} to machine 0 at MASTER_ADDR={address[0]} "
                f"({error.strerror}): check the address and the network, or {NAME_BOTH}"
            ) from None
        return str(probe.getsockname()[0])


def _only_interface(master_addr: str, local: str, interfaces: dict[str, list[str]]) -> str:
    """Return the interface of machine 0 whose name resolves to itself, if there is only one to the outside."""
    outside = [
        name
        for name, addresses in interfaces.items()
        if any(not ip_address(address).is_loopback and not ip_address(address).is_link_local for address in addresses)
    ]
    if len(outside) == 1:
        return outside[0]
    raise ConfigError(
        f"MASTER_ADDR={master_addr} is a loopback address on this machine ({local}), and its interfaces are "
        f"{', '.join(outside) or 'loopback only'}: give the IP address of machine 0, or {NAME_BOTH}"
    )

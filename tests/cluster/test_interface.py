"""The interface that leads to the other nodes. The machine's own interfaces are real only where the test says so."""

import pytest

from worker.cluster import interface
from worker.cluster.interface import Interface, NetworkNotReadyError
from worker.cluster.role import Role
from worker.errors import ConfigurationError

MACHINE = {"lo": ["127.0.0.1", "::1"], "eth0": ["172.17.0.2"], "ens1": ["10.0.0.2", "fd00::2"]}
UNKNOWN = "no-such-host.invalid"


def role(head: str, address: str | None = None, rank: int = 1) -> Role:
    return Role(rank, 2, head, address, None, 29501)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        pytest.param("10.0.0.2", Interface("ens1", "10.0.0.2"), id="IPv4"),
        pytest.param("fd00:0::2", Interface("ens1", "fd00::2"), id="IPv6, written in another way"),
    ],
)
def test_the_interface_has_the_nodes_address(address: str, expected: Interface) -> None:
    assert interface.find(role("10.0.0.1", address), MACHINE) == expected


def test_an_address_of_another_machine_is_a_mistake() -> None:
    with pytest.raises(ConfigurationError) as caught:
        interface.find(role("10.0.0.1", "10.0.0.3"), MACHINE)
    assert str(caught.value) == (
        "No network interface of this machine has the node's address '10.0.0.3'. There are 127.0.0.1 (lo), ::1 (lo), "
        "172.17.0.2 (eth0), 10.0.0.2 (ens1), fd00::2 (ens1). Correct NODE_ADDR and VLLM_HOST_IP, or set neither."
    )


def test_without_an_address_the_interface_is_the_one_that_leads_to_the_head() -> None:
    found = interface.find(role("127.0.0.1"))
    assert found == Interface("lo", "127.0.0.1")
    assert found.address in interface.addresses()[found.name]


@pytest.mark.parametrize("at_fault", [role(UNKNOWN), role("127.0.0.1", UNKNOWN)], ids=["the head", "the node itself"])
def test_a_name_that_cannot_be_looked_up_yet_is_no_wrong_setting(at_fault: Role) -> None:
    with pytest.raises(NetworkNotReadyError, match=f"The host name '{UNKNOWN}' cannot be looked up"):
        interface.find(at_fault, MACHINE)


def test_the_head_warns_if_the_others_look_for_it_elsewhere() -> None:
    own = Interface("ens1", "10.0.0.2")
    (remark,) = interface.remarks(role("10.0.0.1", rank=0), own)
    assert "node 0, at 10.0.0.2, but the head's address 10.0.0.1 leads to 10.0.0.1." in remark
    assert list(interface.remarks(role("10.0.0.2", rank=0), own)) == []
    assert list(interface.remarks(role("10.0.0.1", rank=1), own)) == []
    assert list(interface.remarks(role(UNKNOWN, rank=0), own)) == []

"""The hub alone, spoken to over plain connections, where the order of what it hears matters."""

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from echorl_jax.cluster.hub import Hub
from echorl_jax.cluster.wire import Wire, sign

SECRET = b"of this test"
Address = tuple[str, int]


@pytest.fixture
def opened() -> Iterator[Callable[[int], tuple[Hub, Address]]]:
    listeners: list[socket.socket] = []

    def open_hub(processes: int) -> tuple[Hub, Address]:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        hub = Hub(
            listener,
            processes=processes,
            start_timeout_s=30,
            lost_after_s=30,
            address=lambda: "here:1",
            secret=SECRET,
            source="nowhere",
        )
        hub.start()
        return hub, listener.getsockname()

    yield open_hub
    for listener in listeners:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def prove(address: Address, secret: bytes = SECRET) -> Wire:
    wire = Wire(socket.create_connection(address))
    challenge = wire.receive(timeout_s=10)
    assert challenge is not None
    wire.send(signature=sign(secret, challenge["challenge"]))
    return wire


def say_hello(address: Address, process: int) -> Wire:
    wire = prove(address)
    assert wire.receive(timeout_s=10) == {"accepted": True}
    wire.send(process=process, host=f"host{process}", facts={})
    return wire


def begun(address: Address) -> list[Wire]:
    """Two processes of a run that has started."""
    members = [say_hello(address, process) for process in (0, 1)]
    for member in members:
        assert member.receive(timeout_s=10) == {"address": "here:1"}
    return members


def require_good_end(hub: Hub, members: list[Wire]) -> None:
    for member in members:
        member.send(code=0, line="", certain=False)
    for member in members:
        assert member.receive(timeout_s=10) == {"code": 0, "line": ""}
        member.close()
    hub.wait_until_done()


def test_an_ending_waits_for_process_0(opened: Callable[[int], tuple[Hub, Address]]) -> None:
    """Two claim place 1 before process 0 has said hello: all three are told, it as well."""
    hub, address = opened(3)
    wires = [say_hello(address, 1), say_hello(address, 1)]
    # Hung up on once the hub has listened to it: this connection came after the others.
    stranger = prove(address)
    stranger.send(nothing=True)
    assert stranger.receive(timeout_s=10) == {"accepted": True}
    assert stranger.receive(timeout_s=10) is None
    stranger.close()
    wires.append(say_hello(address, 0))
    for wire in wires:
        told = wire.receive(timeout_s=10)
        assert told is not None and told["code"] == 2
        assert "process 1 on host1 is already there on host1" in told["line"]
        wire.close()
    hub.wait_until_done()


def reset(connection: socket.socket) -> None:
    """Ends with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def half_a_message(connection: socket.socket) -> None:
    connection.sendall(b'{"process": 0, ')


def deep(connection: socket.socket) -> None:
    """Nests deeper than a JSON parser's stack, in the space of a first message."""
    connection.sendall(b"[" * 1023 + b"\n")


def probe(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")


def garbage(connection: socket.socket) -> None:
    connection.sendall(bytes(range(256)) * 40 + b"\n")


def an_end(connection: socket.socket) -> None:
    """Claims to be process 1 and to have failed."""
    connection.sendall(b'{"process": 1, "host": "x", "facts": {}}\n{"code": 2, "line": "evil"}\n')


@pytest.mark.parametrize("stranger", [reset, half_a_message, deep, probe, garbage, an_end])
def test_a_stranger_during_a_run_does_no_harm(
    opened: Callable[[int], tuple[Hub, Address]], stranger: Callable[[socket.socket], None]
) -> None:
    hub, address = opened(2)
    members = begun(address)
    with socket.create_connection(address):  # and one that is silent
        for _ in range(3):
            with socket.create_connection(address) as connection:
                stranger(connection)
        wrong = prove(address, b"of another run")
        assert wrong.receive(timeout_s=10) == {"refused": "nowhere"}
        wrong.close()
        time.sleep(0.2)
        require_good_end(hub, members)


def test_a_process_that_came_twice_does_no_harm_when_it_leaves(
    opened: Callable[[int], tuple[Hub, Address]],
) -> None:
    """It knows the secret, as a second start on the same host does."""
    hub, address = opened(2)
    members = begun(address)
    late = say_hello(address, 1)
    told = late.receive(timeout_s=10)
    assert told is not None and told["line"] == "all processes of this run have come already"
    late.send(code=1, line="not a member", certain=True)
    late.close()
    time.sleep(0.2)
    require_good_end(hub, members)

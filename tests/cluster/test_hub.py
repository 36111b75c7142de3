"""The hub alone, spoken to over plain connections, where the order of what it hears matters."""

import socket

from echorl_jax.cluster.hub import Hub
from echorl_jax.cluster.wire import Wire


def test_an_ending_waits_for_process_0() -> None:
    """Two claim place 1 before process 0 has said hello: all three are told, it as well."""
    listener = socket.create_server(("127.0.0.1", 0))
    hub = Hub(listener, processes=3, start_timeout_s=30, lost_after_s=30, address=lambda: "unused")
    hub.start()

    def say_hello(process: int) -> Wire:
        wire = Wire(socket.create_connection(listener.getsockname()))
        wire.send(process=process, host=f"host{process}", facts={})
        return wire

    wires = [say_hello(1), say_hello(1)]
    # Answered once the hub has listened to it: a stranger who is hung up on came after the others.
    stranger = Wire(socket.create_connection(listener.getsockname()))
    stranger.send(nothing=True)
    assert stranger.receive(timeout_s=10) is None
    stranger.close()
    wires.append(say_hello(0))
    for wire in wires:
        told = wire.receive(timeout_s=10)
        assert told is not None and told["code"] == 2
        assert "process 1 on host1 is already there on host1" in told["line"]
        wire.close()
    hub.wait_until_done()

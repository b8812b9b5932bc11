"""horovodrun, listening on one network interface, and unpickling nothing that comes from there.

    python -m launch.closed …     the words of horovodrun

Without MPI the ranks meet at a key-value store in horovodrun, which speaks HTTP and asks nobody who
they are. Horovod 0.28.1 opens it on every interface of the host, and under Horovod Elastic it
unpickles what is PUT to /worker_addresses: whoever reached its port could run code as the user
(CVE-2024-10190). And it hands out again what was PUT there, a rank's key for messages that the rank
unpickles. Here the store listens on the address that the ranks are told, what ranks say of
themselves is read as plain data, and their keys are not given away.
"""

from __future__ import annotations

import base64
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

_MOST = 1 << 20  # characters of what a rank says of itself


class _Plain(pickle.Unpickler):
    """Numbers, text, bytes, and lists, tuples and dictionaries of them; there is nothing in these
    that could be called."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def plain(encoded: bytes) -> tuple[dict[str, list[tuple[str, int]]], bytes]:
    """A rank's addresses by interface, and its key, as Horovod encodes them (base64 of a pickle).

    Raises ValueError for anything else.
    """
    if len(encoded) > _MOST:
        raise ValueError(f"{len(encoded)} bytes are no addresses")
    try:
        value = _Plain(io.BytesIO(base64.b64decode(encoded, validate=True))).load()
        addresses, key = value
        fits = isinstance(key, bytes) and all(
            isinstance(name, str) and isinstance(port, int) and isinstance(address, str)
            for name, listed in addresses.items()
            for address, port in listed
        )
    except Exception as error:  # a pickle answers damage with whatever happens
        raise ValueError(f"not a rank's addresses ({type(error).__name__})") from None
    if not fits:
        raise ValueError("not a rank's addresses")
    return addresses, key


class _Doors:
    """Where the store is to listen: on the address that the ranks are told."""

    def __init__(self) -> None:
        self.address: str | None = None

    def noting(self, driver_ip: Callable[[Any], str]) -> Callable[[Any], str]:
        """horovodrun's choice of that address, remembered."""

        def chosen(interfaces: Any) -> str:
            self.address = driver_ip(interfaces)
            return self.address

        return chosen

    def find_port(self, serve: Callable[[tuple[str, int]], Any]) -> tuple[Any, int]:
        """In place of Horovod's, which binds to all interfaces."""
        if self.address is None:
            raise RuntimeError("the store is to be opened before its address is known")
        server = serve((self.address, 0))
        return server, server.server_address[1]


def close_doors() -> None:
    """Change the horovodrun of this process."""
    from horovod.runner import gloo_run, launch
    from horovod.runner.elastic import rendezvous
    from horovod.runner.http import http_server
    from horovod.runner.util import network

    doors = _Doors()
    network.get_driver_ip = doors.noting(network.get_driver_ip)
    http_server.find_port = doors.find_port
    run_elastic = launch.gloo_run_elastic

    def elastic(settings: Any, *rest: Any) -> Any:
        network.get_driver_ip(settings.nics)  # which it asks for after it has opened the store
        return run_elastic(settings, *rest)

    launch.gloo_run_elastic = elastic
    gloo_run.create_rendezvous_handler = _closed_handler(
        rendezvous.create_rendezvous_handler, rendezvous.PUT_WORKER_ADDRESSES
    )


def _closed_handler(create: Callable[[Any], type], scope_of_ranks: str) -> Callable[[Any], type]:
    def create_closed(driver: Any) -> type:
        base: Any = create(driver)

        class Handler(base):  # type: ignore[misc]
            def _put_value(self, scope: str, key: str, value: bytes) -> None:
                if scope != scope_of_ranks:
                    super()._put_value(scope, key, value)
                    return
                try:
                    host, _, rank = key.rpartition(":")
                    self._put_worker_addresses(host, int(rank), *plain(value))
                except ValueError as error:
                    print(f"harness: refused what was PUT to {scope}: {error}", file=sys.stderr)

        return Handler

    return create_closed


if __name__ == "__main__":
    close_doors()
    from horovod.runner.launch import run_commandline

    sys.exit(run_commandline())

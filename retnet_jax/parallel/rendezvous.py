"""Processes wait for each other at an address before jax connects them.

If a process is missing, or another program listens at the address, jax's own service kills every
process with a page of C++ messages. So they meet here first: process 0 listens, and each other
process sends its number. When all have come, process 0 tells them to go, and frees the port for
jax.
"""

import contextlib
import errno
import socket
import time

from retnet_jax.errors import ConfigError

_GO = "retnet_jax: go"
_ASK_SECONDS = 5.0  # to wait for one message; the sender has nothing else to do


def meet(coordinator: str, count: int, index: int, seconds: float) -> None:
    """Returns when all processes of a run have come.

    Args:
      coordinator: HOST:PORT of process 0.
      count: Number of processes.
      index: Number of this process.
      seconds: Time to wait for the others.

    Raises:
      ConfigError: in one line, if some do not come in time, if the address is wrong or taken, and
        if two processes have the same number.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator_address={coordinator} is not HOST:PORT")
    end = time.monotonic() + seconds
    if index == 0:
        _let_all_go(coordinator, int(port), count, end, seconds)
    else:
        _ask_to_go(coordinator, (host.strip("[]"), int(port)), count, index, end, seconds)


def _let_all_go(coordinator: str, port: int, count: int, end: float, seconds: float) -> None:
    waiting: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(coordinator, port))
        while len(waiting) < count - 1:
            listener.settimeout(max(end - time.monotonic(), 0.01))
            try:
                connection = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in waiting)
                raise ConfigError(
                    f"process 0 at --coordinator_address={coordinator} waited {seconds} s, but of "
                    f"--num_processes={count} these did not connect: {missing}; start them with "
                    "the same address, or restart all with a smaller --num_processes"
                ) from None
            words = _received(connection).split()
            if len(words) != 3 or words[0] != "retnet_jax:" or not words[1].isdigit():
                continue  # not of this run, such as a port scanner
            index = int(words[1])
            if words[2] != str(count):
                _send(
                    connection,
                    f"process 0 has --num_processes={count}, but process {index} has {words[2]}",
                )
            elif index in waiting:
                _send(connection, f"another process has --process_id={index} too")
            else:
                waiting[index] = connection
        for connection in waiting.values():
            _send(connection, _GO)
        for connection in waiting.values():
            _received(connection)  # they close first: the side that does keeps its port busy


def _ask_to_go(
    coordinator: str, address: tuple[str, int], count: int, index: int, end: float, seconds: float
) -> None:
    while True:
        try:
            with socket.create_connection(address, timeout=_ASK_SECONDS) as connection:
                _send(connection, f"retnet_jax: {index} {count}")
                answer = _received(connection, max(end - time.monotonic(), 0.01))
            reason = "it closed the connection or sent nothing"
        except OSError as error:
            answer, reason = "", str(error)
        if answer == _GO:
            return
        if answer:
            known = answer.startswith(("process 0 has", "another process has"))
            what = answer if known else "another program than process 0 of this run answers there"
            raise ConfigError(f"--coordinator_address={coordinator}: {what}")
        if time.monotonic() > end:
            raise ConfigError(
                f"--coordinator_address={coordinator} could not be reached within {seconds} s "
                f"({reason}): process 0 must run there, and its port must be open"
            )
        time.sleep(0.5)


def _listener(coordinator: str, port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ConfigError(f"--coordinator_address={coordinator}: {error}") from error
        raise ConfigError(
            f"--coordinator_address={coordinator}: another program uses port {port} of this "
            "machine; give all processes another port"
        ) from None


def _send(connection: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # if the other end has gone, the run notices it later
        connection.sendall(f"{text}\n".encode())


def _received(connection: socket.socket, seconds: float = _ASK_SECONDS) -> str:
    """A line from the other end; "" if none comes."""
    found = b""
    connection.settimeout(seconds)
    with contextlib.suppress(OSError):
        while not found.endswith(b"\n") and len(found) < 1000:
            if not (more := connection.recv(1000)):
                break
            found += more
    return found.decode("utf-8", "replace").strip()

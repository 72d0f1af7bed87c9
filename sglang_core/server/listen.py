"""Bind the port before the model loads, so that a port in use is an error at once."""

from __future__ import annotations

import errno
import socket

from sglang_core.config import ServerArgs
from sglang_core.errors import ConfigError

BACKLOG = 2048


def listen(server: ServerArgs) -> socket.socket:
    """A listening socket. Raises ConfigError that says why not and what to do."""
    where = f"--host {server.host} --port {server.port}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as exc:
        raise ConfigError(f"{where}: no such address ({exc}); set --host to one of this machine's, or 0.0.0.0") from exc
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise ConfigError(f"{where}: {_way_out(exc, server)}") from exc
    sock.setblocking(False)
    return sock


def base_url(server: ServerArgs, sock: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    port = sock.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(server.host, server.host)
    return f"http://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"http://{host}:{port}"


def _way_out(exc: OSError, server: ServerArgs) -> str:
    if exc.errno == errno.EADDRINUSE:
        holder = f"ss -ltnp 'sport = :{server.port}'"
        return f"the port is in use; stop what listens there ({holder}) or set --port (0 picks a free one)"
    if exc.errno == errno.EACCES:
        return "not allowed to listen there; set --port to 1024 or above"
    if exc.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address; set --host to one that it has, or 0.0.0.0"
    return f"cannot listen ({exc.strerror}); set another --host or --port"

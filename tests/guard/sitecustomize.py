"""Put on PYTHONPATH by a test: notes every host that a process tries to reach, other than this machine, in $GUARD_LOG."""

import os
import socket

_connect = socket.socket.connect
_getaddrinfo = socket.getaddrinfo
_HERE = ("localhost", "::1", "0.0.0.0", socket.gethostname(), "", None)


def _note(host):
    if isinstance(host, bytes):
        host = host.decode()
    if host not in _HERE and not str(host).startswith("127."):
        with open(os.environ["GUARD_LOG"], "a") as file:
            file.write(f"{host}\n")


def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        _note(address[0])
    return _connect(self, address)


def getaddrinfo(host, *args, **kwargs):
    _note(host)
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect = connect
socket.getaddrinfo = getaddrinfo

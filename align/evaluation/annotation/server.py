"""Serves the page: on this machine alone, or with a password to others."""

from __future__ import annotations

import hmac
import importlib
import ipaddress
import socket
import threading
from collections.abc import Callable

from align.errors import DataError, UserError
from align.evaluation.annotation import page as annotation_page
from align.evaluation.annotation.session import Session, check_name

PASSWORD = "ALIGN_ANNOTATE_PASSWORD"
"""Environment variable with the password; an argument would be visible to other users."""
MIN_PASSWORD = 8
AGREEMENT = "align.functional.agreement"


def check_address(host: str, port: int, password: str | None) -> None:
    """Check that the page can listen at an address, and with a password if others reach it.

    Raises:
        UserError: One line that names the option and the repair.
    """
    problems = []
    if password is not None and len(password) < MIN_PASSWORD:
        problems.append(f"{PASSWORD}: expected {MIN_PASSWORD} characters or more")
    if not is_loopback(host) and password is None:
        problems.append(
            f"--host {host}: other machines can reach the page; set {PASSWORD} to a password, or "
            "leave --host out"
        )
    if problems:
        raise UserError(*problems)
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(
            f"--host {host}: {error.strerror}; name an address of this machine"
        ) from None
    with socket.socket(address[0], socket.SOCK_STREAM) as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(address[4])
        except OSError as error:
            raise UserError(
                f"--host {host} --port {port}: {error.strerror}; name another port with --port"
            ) from None


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    session: Session,
    wait: Callable[[str], None],
    *,
    guideline: str,
    host: str,
    port: int,
    password: str | None,
) -> None:
    """Serve the page in threads of this process while ``wait``, called with its address, runs."""
    page = annotation_page.build_page(session, guideline)

    def log_in(name: str, given: str) -> bool:
        try:
            check_name(name)
        except DataError:
            return False
        return hmac.compare_digest(given.encode(), (password or "").encode())

    page.launch(
        server_name=host,
        server_port=port,
        auth=log_in if password is not None else None,
        auth_message="Your name as an annotator, and the password of this page.",
        prevent_thread_lock=True,
        quiet=True,
        **annotation_page.launch_options(),
    )
    # The agreement needs torch, whose import takes seconds: not while somebody waits for a pair.
    threading.Thread(target=importlib.import_module, args=(AGREEMENT,)).start()
    try:
        wait(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{page.server_port}/")
    finally:
        page.close(verbose=False)

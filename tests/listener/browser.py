"""A real browser, without a screen, and the status page in a real server."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from selenium import webdriver
from starlette.applications import Starlette

from builder.listener.overview import Overview
from builder.listener.page import routes
from builder.settings import ListenSettings
from tests.waiting import HANG


@contextlib.contextmanager
def served(settings: ListenSettings, overview: Overview, *, port: int = 0) -> Iterator[str]:
    """Serve the status page on a port, or one of its own, and give its address, without a path."""
    config = uvicorn.Config(
        Starlette(routes=routes(settings, overview)),
        log_config=None,
        lifespan="off",
        # A client that sends its next request as its connection is closed would fail.
        timeout_keep_alive=int(HANG),
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", port)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            overview.close()
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def chromium(profile: Path, *, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """Start Debian's Chromium without a screen; skips where it is not installed."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("Debian's packages chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # As root, and in a container, its sandbox cannot start; it shows our own page alone.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(HANG)
    try:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield browser
    finally:
        browser.quit()

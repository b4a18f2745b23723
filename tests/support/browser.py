"""A headless Chromium without a network, for tests that look at a page as a person does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A selenium driver, always quit. Skips the test, with what to do, where Debian's packages are missing."""
    for path in (CHROMIUM, DRIVER):
        if not os.access(path, os.X_OK):
            pytest.skip(f"NO BROWSER, THE PAGE IS NOT LOOKED AT: {path} is missing; as root, `make debian` installs it")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new",
        "--no-sandbox",  # root in a container has no user namespace to make one
        "--disable-dev-shm-usage",  # a container's /dev/shm may be 64 MB
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--window-size={width},{height}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1,localhost")  # selenium speaks to the driver over loopback, past any proxy
        patch.setenv("SE_OFFLINE", "true")
        driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        try:
            # the window's size includes its frame; this is the page's
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            yield driver
        finally:
            driver.quit()


def set_scheme(driver: Any, scheme: str) -> None:
    """`light` or `dark`, as the person's system would say it."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})

"""Secrets planted in the environment of a command, which nothing that it writes, prints or starts may tell."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from uuid import uuid4

NAMES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
)
_CREDENTIALS = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"


class Planted:
    """env: variables with a secret in each. secrets: the texts to look for. file: one of AWS's with credentials."""

    def __init__(self, folder: Path, *without: str) -> None:
        """without: variables that are left out, since a server of the test would refuse a made-up value."""
        self.env = {name: f"planted-{uuid4().hex}" for name in NAMES if name not in without}
        user, password, *filed = (f"planted-{uuid4().hex}" for _ in range(4))
        self.secrets = [*self.env.values(), password, *filed]
        login = (self.env["MLFLOW_TRACKING_USERNAME"], self.env["MLFLOW_TRACKING_PASSWORD"]), (user, password)
        self.secrets += [b64encode(":".join(pair).encode()).decode() for pair in login]  # as HTTP sends them
        proxies = dict.fromkeys(("http_proxy", "HTTPS_PROXY", "https_proxy"), f"http://{user}:{password}@127.0.0.1:9")
        self.file = folder / f"credentials-{uuid4().hex}"
        self.file.write_text(_CREDENTIALS.format(*filed))
        self.file.chmod(0o600)
        self.env |= {**proxies, "AWS_SHARED_CREDENTIALS_FILE": str(self.file)}

    def told(self, *texts: str | bytes) -> list[str]:
        """The secrets that occur in the texts."""
        content = b"\n".join(text.encode() if isinstance(text, str) else text for text in texts)
        return [secret for secret in self.secrets if secret.encode() in content]

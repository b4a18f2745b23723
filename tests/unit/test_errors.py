"""Errors: one exit code each, no secrets, whole after a journey between ranks."""

from __future__ import annotations

import pickle

from warm_dist import errors
from warm_dist.errors import redact


def test_every_error_travels_between_ranks():
    for error in (
        errors.PeerError("gone", 11, True),
        *(kind("x") for kind in errors.WarmDistError.__subclasses__() if kind is not errors.PeerError),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.exit_code, again.resumable) == (
            type(error),
            str(error),
            error.exit_code,
            error.resumable,
        )


def test_what_is_told_has_no_secrets(capsys):
    errors.print_error(
        errors.UnreachableError("https://key:hunter2@s3.example/x?X-Amz-Signature=hunter2 does not answer")
    )
    assert capsys.readouterr().err == "UnreachableError: https://s3.example/x does not answer\n"


def test_exit_codes_are_distinct():
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.WarmDistError)
    ]
    codes = [kind.exit_code for kind in kinds if kind not in (errors.WarmDistError, errors.PeerError)]
    assert len(set(codes)) == len(codes) >= 11


def test_public_takes_secrets_out_of_urls_only() -> None:
    assert redact("see https://u:p@ss@host/x") == "see https://host/x"
    tree = {"a": ["http://u:p@h:1/x?sig=1#f", 3, None], "b": "see https://h/x?k=1 and s3://b/k, 5 @ 3? yes #1"}
    assert redact(tree) == {"a": ["http://h:1/x", 3, None], "b": "see https://h/x and s3://b/k, 5 @ 3? yes #1"}

"""Records: small JSON files that are read back, each with a digest of its content and a strict schema."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from warm_dist.errors import print_once
from warm_dist.files import read_regular, replace_file

DIGEST = "sha256"
"""The key of the digest in a file."""
MOST_BYTES = 64 << 20
"""Of a record; what is longer is not one."""


class Record(BaseModel):
    """Base of all records: frozen; unknown, missing and mistyped keys are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


R = TypeVar("R", bound=Record)


class DamagedError(Exception):
    """A record that is not as it was written; the text says why, without the file's name."""


def seal(tree: dict[str, Any]) -> bytes:
    """The tree as JSON text whose last key is the digest of the others."""
    return (json.dumps({**tree, DIGEST: digest(tree)}, indent=2) + "\n").encode()


def unseal(data: bytes, schema: type[R]) -> R:
    """Parse what `seal` wrote. Raises DamagedError for anything else.

    A record without a digest, as older versions wrote them, is read by its schema alone.
    """
    try:
        tree = json.loads(data.decode())
        if not isinstance(tree, dict):
            raise DamagedError("is not a JSON object")
        if DIGEST in tree and tree.pop(DIGEST) != digest(tree):
            raise DamagedError("differs from what was written (another sha256)")
        return schema.model_validate_json(json.dumps(tree))  # through JSON: lists become tuples
    except ValidationError as error:
        raise DamagedError(f"is damaged ({_wrong(error)})") from None
    except (ValueError, RecursionError):
        raise DamagedError("is not JSON") from None


def _wrong(error: ValidationError) -> str:
    """The first thing that is wrong, in words."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    words = {"missing": f"lacks {where}", "extra_forbidden": f"has an unknown key, {where}"}
    return words.get(first["type"], f"{where or 'it'} is {json.dumps(first['input'])[:60]}")


def write_record(path: Path, tree: dict[str, Any]) -> None:
    """Replace a record durably, in a folder that exists. Raises OutputError."""
    replace_file(path, lambda temporary: temporary.write_bytes(seal(tree)), parents=False)


def read_record(path: Path, schema: type[R]) -> R | None:
    """Read a record; None if there is none, or if it is damaged, which is told once on stderr."""
    try:
        return unseal(read_regular(path, MOST_BYTES), schema)
    except FileNotFoundError:
        return None
    except (OSError, DamagedError) as error:
        why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        print_once(f"{path}: {why}; passed over")
        return None


def digest(tree: dict[str, Any]) -> str:
    """The sha256 of a JSON tree's content, 64 hex digits, whatever its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

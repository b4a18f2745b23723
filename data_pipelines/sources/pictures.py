"""Which files are pictures, by name and by content, and what the others are."""

from __future__ import annotations

import re

_PICTURES = re.compile(
    r"\.(png|apng|jpg|jpeg|jpe|jfif|webp|bmp|dib|gif|tif|tiff|avif|jp2|j2k|jpx|ppm|pgm|pbm|pnm|tga|qoi)"
)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI")
"""PIL's names of the pictures that are read; others, such as EPS, would run programs or are no pictures."""

_ARCHIVES = re.compile(r"\.(zip|tar|gz|tgz|bz2|xz|zst|7z|rar|parquet|arrow|tfrecords?|lmdb|mdb|h5|hdf5)")
_TEMPORARY = re.compile(r"\.(bak|tmp|part|partial|crdownload|orig|old)|~")
# Camera raw files are TIFFs whose first picture is a thumbnail, so that content would deceive.
_OTHERS = re.compile(
    r"\.(txt|md|jsonl?|csv|tsv|xml|html|ya?ml|cls|py|ipynb|log|pdf|svg|npy|npz|pt|pth|pkl|pickle|safetensors|mat|db|ini|mp4|avi|mov|mkv"
    r"|webm|mp3|wav|heic|heif|ico|psd|eps|ps|exr|hdr|dng|cr2|cr3|nef|arw|orf|rw2|raf|pef|srw)"
)
_SYSTEM = re.compile(
    r"__macosx|@eadir|#recycle|\$recycle\.bin|lost\+found|system volume information|thumbs\.db|desktop\.ini|ehthumbs\.db"
)
PICTURE = "picture"
HEAD_BYTES = 32  # tell every format of `looks_like_a_picture`


def parts_of(name: str) -> tuple[str, ...]:
    """The folders and the base of a name, without empty ones and `.`."""
    return tuple(part for part in name.split("/") if part not in ("", "."))


def plain(name: str) -> str:
    """A name inside an archive as if it were one of a folder; some Windows programs write backslashes."""
    return "/".join(parts_of(name.replace("\\", "/")))


def suffix_of(name: str) -> str:
    """The suffix in lower case with its dot; "" if there is none, or only what follows a dot in a sentence or a number."""
    found = re.search(r"[^/](\.(?=[0-9]*[A-Za-z])[A-Za-z0-9]{1,10}|~)$", name)
    return found[1].lower() if found else ""


def is_hidden(name: str) -> bool:
    """Whether a file is hidden, or in a hidden folder, or one of those that systems and file managers leave everywhere."""
    parts = parts_of(name)
    return any((part.startswith(".") and part != "..") or _SYSTEM.fullmatch(part.lower()) for part in parts)


def kind_of(name: str) -> str:
    """What a file is by its name: "" if only its content tells, PICTURE, or why it is left out."""
    suffix = suffix_of(name)
    kinds = {
        PICTURE: _PICTURES,
        "archives or tables inside": _ARCHIVES,
        "backups and unfinished copies": _TEMPORARY,
        "no pictures": _OTHERS,
    }
    return next((kind for kind, suffixes in kinds.items() if suffixes.fullmatch(suffix)), "")


def looks_like_a_picture(head: bytes) -> bool:
    """Whether a file's first HEAD_BYTES bytes are those of a picture, whatever its name."""
    return (
        head.startswith(
            (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"qoif")
        )
        or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and b"avif" in head[8:])
        or (head.startswith(b"BM") and head[6:10] == bytes(4) and len(head) == HEAD_BYTES)
    )

"""What kind of file lies at a path, by its content: the name of a file may say anything.

    kind_of(path) -> "torch", "old torch", "npy", "npz" or "safetensors"

Everything else is a ValueError, whose sentence says what it is.
"""
import os
import re
import zipfile

OTHERS = [  # (place, the bytes there, what such a file is)
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\0", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"%PDF", "a PDF file"),
    (0, b"\x89PNG", "a picture (PNG)"),
    (0, b"\xff\xd8\xff", "a picture (JPEG)"),
    (0, b"GIF8", "a picture (GIF)"),
    (0, b"BM", "a picture (BMP)"),
    (0, b"II*\0", "a picture (TIFF)"),
    (0, b"MM\0*", "a picture (TIFF)"),
    (8, b"WEBP", "a picture (WebP)"),
]
# torch.save before torch 1.6 began every file with this number, as a pickle (torch.serialization)
OLD_TORCH = (0x1950a86a20f9469cfc6c).to_bytes(10, "little")
# A pickle begins with its protocol, 2 to 5. Those of protocols 0 and 1 begin with a dict or a list
# and its number, or with the name of what is built.
PICKLE = re.compile(rb"\x80[\x02-\x05]|\([dl]p\d+\n|[}\]]q\0"
                    rb"|c[\w.]+\n[\w.]+\n(?:p\d+\n|q|\()")
# An ONNX file is a protobuf message: field 1, a version below 128, and then field 2, 3 or 7
ONNX = re.compile(rb"\x08[\x01-\x7f][\x12\x1a\x3a]")


def kind_of(path):
    """"torch" (a zip archive by torch.save), "old torch" (by torch before 1.6), "npy", "npz" or
    "safetensors".

    ValueError, one sentence, for a file that is missing, empty or cut short, that would run code,
    or that is no checkpoint.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path}: the file is empty")
    if start.startswith(b"PK"):
        return kind_of_zip(path)
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    length = int.from_bytes(start[:8], "little")  # of the JSON text that begins a safetensors file
    if start[8:9] == b"{" and 2 <= length <= 100_000_000:
        return "safetensors"
    if PICKLE.match(start):
        if OLD_TORCH in start[:40]:
            return "old torch"
        raise ValueError(f"{path}: refused, it is a pickle that torch.save did not write, and to "
                         "read one can run code; nothing was run. Where you trust it, load it and "
                         "write its tensors with torch.save")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: this is a Git LFS pointer, not the file itself; run "
                         "`git lfs pull`")
    raise ValueError(f"{path}: this is {other_kind(start)}, not a checkpoint")


def kind_of_zip(path):
    """kind_of for a file that begins as a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # BadZipFile, and others for a list of names that is damaged
        raise ValueError(f"{path}: cannot be read, it is cut short or damaged (a zip archive "
                         "without its end); fetch it again") from None
    if any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in names):
        raise ValueError(f"{path}: refused, it is a TorchScript program, and to load one can run "
                         "code; nothing was run. Where you trust it, write the state_dict() of "
                         "its module with torch.save")
    if any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise ValueError(f"{path}: this is a zip archive that torch.save did not write, not a "
                     "checkpoint")


def other_kind(start):
    """Words for a file that is not read and begins with the bytes `start`."""
    for place, signature, words in OTHERS:
        if start[place:].startswith(signature):
            return words
    if ONNX.match(start):
        return "an ONNX file"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if any(byte < 32 and byte not in b"\t\n\v\f\r\x1b" for byte in text):
        return f"of no known kind (it begins with {start[:4].hex(' ')})"
    if text.startswith(b"<"):
        return "a web page (HTML) as failed downloads leave it"
    return "a JSON file" if text[:1] in (b"{", b"[") else "plain text"

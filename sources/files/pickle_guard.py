"""Checks the pickle of a ``.pth`` file before torch loads it: it may name nothing but what plain tensors need."""

import codecs
import io
import pickletools
import zipfile
from pathlib import Path

from pos2d.errors import InputError, UnsafeInputError
from pos2d.git_lfs import refuse_pointer

STORAGES = ("BFloat16", "Half", "Float", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED_GLOBALS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    *(("torch", f"{kind}Storage") for kind in STORAGES),
}
LOOSE_PICKLE_BYTES = 16 << 20
# Opcodes that import or call an object by other means than GLOBAL; torch.save of tensors uses none of them.
FORBIDDEN_OPCODES = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}


def check_pickle(path: Path) -> None:
    """Read the opcodes of a ``torch.save`` file without running them.

    Raises:
        UnsafeInputError: the pickle names something that is not part of a plain tensor.
        InputError: the file is not what ``torch.save`` writes, or a Git LFS pointer.
    """
    refuse_pointer(path)
    is_archive = zipfile.is_zipfile(path)
    data = _pickle_of_archive(path) if is_archive else _start_of(path)
    forbidden = _forbidden_objects(io.BytesIO(data))
    if forbidden is None and not is_archive and _is_text(data):
        raise InputError(f"{path} is a text, not a LoRA file; give the file that the training saved")
    if forbidden is None:
        raise InputError(
            f"{path} is not a LoRA file: torch.save did not write it, or it is incomplete; give the trainer's .pth "
            "file or a PEFT directory, or copy the file again"
        )
    if forbidden:
        raise UnsafeInputError(f"{path} would run {forbidden[0]}; a LoRA file holds tensors only, do not load it")
    if not is_archive:
        raise InputError(f"{path} is in a format that torch.save no longer writes; load it and save it again")


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LOOSE_PICKLE_BYTES)


def _is_text(data: bytes) -> bool:
    """Whether ``data``, the beginning of a file, is text in UTF-8; its last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return bool(data) and b"\0" not in data


def _pickle_of_archive(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise UnsafeInputError(f"{path} has compressed members, which torch.save never writes; do not load it")
            # torch ignores the case of the name when it looks for its pickle.
            names = [member.filename.lower() for member in members]
            pickles = [member for member in members if member.filename.lower().endswith(".pkl")]
            if len(set(names)) < len(names):
                raise UnsafeInputError(f"{path} has two members of one name, which torch.save never writes")
            if len(pickles) != 1 or not pickles[0].filename.endswith("data.pkl"):
                raise InputError(f"{path} is not a LoRA file: it holds {len(pickles)} pickles, torch.save writes one")
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise InputError(f"{path} is damaged ({error}); copy the adapter again") from None


def _forbidden_objects(stream: io.BytesIO) -> list[str] | None:
    """What the pickles of ``stream`` name that tensors do not need; None if not even one pickle is complete."""
    forbidden: list[str] = []
    complete = 0
    while True:
        try:
            named = [
                name
                for opcode, argument, _ in pickletools.genops(stream)
                if (name := _forbidden(opcode.name, argument))
            ]
        except Exception:  # pickletools lets many kinds of error through when a stream is broken
            return forbidden if complete else None
        forbidden += named
        complete += 1


def _forbidden(opcode: str, argument: object) -> str | None:
    """A name for what an opcode imports or calls; None if it is allowed."""
    if opcode == "GLOBAL":
        module, _, name = str(argument).partition(" ")
        return None if (module, name) in ALLOWED_GLOBALS else f"{module}.{name}"
    return f"an unknown object ({opcode})" if opcode in FORBIDDEN_OPCODES else None

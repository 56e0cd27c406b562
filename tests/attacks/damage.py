"""Random damage of a folder, and what became of a command that reads it."""

import contextlib
import io
import shutil
import warnings

# Files that nothing reads again.
_OUTPUTS = ("tensorboard", "curves.png", "report.md", "report.html", "summary.csv")


def damage(folder, rng):
    """Damages one file or folder; returns what was done.

    Args:
        folder: a run folder or a comparison.
        rng: a `random.Random`.
    """
    parts = [path for path in sorted(folder.rglob("*")) if not _is_output(path, folder)]
    files = [path for path in parts if path.is_file() and path.stat().st_size]
    kind = rng.choice([*_KINDS, "missing", "missing folder", "doubled"])
    if kind == "missing folder":
        path = rng.choice([path for path in parts if path.is_dir()])
        shutil.rmtree(path)
    elif kind == "missing":
        path = rng.choice(files)
        path.unlink()
    elif kind == "doubled":
        path, other = rng.sample(files, 2)
        shutil.copy(other, path)
        kind = f"{other.relative_to(folder)} instead"
    else:
        path = rng.choice(files)
        path.write_bytes(_KINDS[kind](path.read_bytes(), rng))
    return f"{path.relative_to(folder)}: {kind}"


def _is_output(path, folder):
    name = path.relative_to(folder).parts[0]
    return name in _OUTPUTS or name.endswith(".svg")


def _flipped(content, rng):
    place = rng.randrange(len(content))
    return (
        content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    )


def _digit(content, rng):
    places = [place for place, byte in enumerate(content) if 48 <= byte < 58]
    if not places:
        return _flipped(content, rng)
    place = rng.choice(places)
    other = rng.choice([digit for digit in b"0123456789" if digit != content[place]])
    return content[:place] + bytes([other]) + content[place + 1 :]


def _line(content, rng):
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    return b"".join([*lines[: place + 1], *lines[place:]])


_KINDS = {
    "bit": _flipped,
    "digit": _digit,
    "line twice": _line,
    "shortened": lambda content, rng: content[: rng.randrange(len(content))],
    "longer": lambda content, rng: content + rng.randbytes(rng.randrange(1, 9)),
    "zeros": lambda content, rng: bytes(len(content)),
    "other encoding": lambda content, rng: content.replace(b'"', b"\xff\xfe", 1),
    "not a number": lambda content, rng: content.replace(b"0.", b"NaN", 1),
}


def outcome(main, *args):
    """Returns status, output and errors of a command in this process; None for a traceback."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        # Files that failed reads left open.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            main([str(arg) for arg in args])
        except SystemExit as exit_:
            status = exit_.code or 0
        except Exception as error:
            return None, out.getvalue(), repr(error)
    return status, out.getvalue(), err.getvalue()


def verdict(result, is_right):
    """Returns "survived", "refused", "wrong" or "traceback".

    Args:
        result: what :func:`outcome` returned.
        is_right: whether the results are those of the undamaged folder.
    """
    status, _, err = result
    if status is None:
        return "traceback"
    if status == 0:
        return "survived" if is_right() else "wrong"
    return "refused" if err.count("\n") == 1 else "traceback"

"""Add the extension points of patches/ to SGLang 0.5.23, or take them away again.

    python scripts/apply_patches.py [--check | --revert] [--target DIR]

DIR holds the package directory sglang/; without it the installed SGLang is changed, after a
question. All files are compared with those of the release before anything is written, and again
behind it. --check exits with 0 if the whole series is applied, with 1 if nothing of it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PATCHES = Path(__file__).resolve().parent.parent / "patches"
#: Hashes of the files that the series touches, without and with it; null: not there.
SERIES = PATCHES / "series.json"
#: The patches are against SGLang's repository, where the package is in python/.
STRIP = "-p2"


class PatchError(Exception):
    """The series cannot be applied or reverted; the message names the file."""


def load_series() -> tuple[str, dict[str, dict[str, str | None]]]:
    """Version of SGLang, and for each file its hashes ``without`` and ``with`` the series."""
    series = json.loads(SERIES.read_text())
    return series["version"], series["files"]


def hash_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def is_applied(target: Path) -> bool:
    """Whether the whole series is applied; False: nothing of it is.

    Raises:
        PatchError: neither, or there is no SGLang of the right version.
    """
    version, files = load_series()
    if not (target / "sglang").is_dir():
        raise PatchError(f"{target} holds no directory sglang")
    for found in target.glob("sglang-*.dist-info"):
        if found.name != f"sglang-{version}.dist-info":
            raise PatchError(f"the patches are for SGLang {version}, and {target} has {found.name}")
    states = {}
    for name, hashes in files.items():
        now = hash_of(target / name)
        if now not in hashes.values():
            raise PatchError(f"{target / name} is not that of SGLang {version}, with or without")
        states[name] = now == hashes["with"]
    if len(set(states.values())) > 1:
        name = next(name for name, applied in states.items() if not applied)
        raise PatchError(f"the series is applied in parts: {target / name} lacks it")
    return all(states.values())


def git_apply(target: Path, patches: Sequence[Path], *flags: str) -> str:
    """All patches or none: that is git's doing. Gives what git prints.

    Raises:
        PatchError: with git's message.
    """
    # A repository around the target is none of our business.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(target.parent)}
    command = ["git", "apply", STRIP, *flags, *map(str, patches)]
    try:
        done = subprocess.run(
            command, cwd=target, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise PatchError("git is not installed") from error
    if done.returncode:
        raise PatchError(f"git apply failed: {done.stderr.strip()}")
    return done.stdout


def change(target: Path, revert: bool) -> bool:
    """Apply or revert the series; False where that is so already.

    Raises:
        PatchError: nothing was changed.
    """
    if is_applied(target) is not revert:
        return False
    patches = sorted(PATCHES.glob("*.patch"))
    if revert:
        git_apply(target, patches[::-1], "--reverse")
    else:
        git_apply(target, patches)
    if is_applied(target) is revert:
        raise PatchError(f"git left {target} as it was")
    return True


def write_series(target: Path) -> None:
    """Write ``series.json`` for the patches as they are now and the release in ``target``."""
    found = next(iter(target.glob("sglang-*.dist-info")), None)
    if found is None:
        raise PatchError(f"{target} holds no sglang-VERSION.dist-info: which release is it?")
    patches = sorted(PATCHES.glob("*.patch"))
    touched = git_apply(target, patches, "--numstat").splitlines()
    names = sorted({line.split("\t")[2] for line in touched})
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if (target / name).exists():
                shutil.copy(target / name, copy / name)
        without = {name: hash_of(copy / name) for name in names}
        git_apply(copy, patches)
        files = {name: {"without": without[name], "with": hash_of(copy / name)} for name in names}
    version = found.name.removeprefix("sglang-").removesuffix(".dist-info")
    SERIES.write_text(json.dumps({"version": version, "files": files}, indent=2) + "\n")


def installed() -> Path:
    """Where the installed SGLang is, found without importing it."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        raise PatchError("SGLang is not installed here: name its directory with --target")
    return Path(found.origin).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="only say whether it is applied")
    what.add_argument("--revert", action="store_true", help="take the series away again")
    what.add_argument(
        "--write-series",
        action="store_true",
        help="write patches/series.json for patches that were changed, and the SGLang in DIR",
    )
    parser.add_argument("--target", type=Path, metavar="DIR", help="directory that holds sglang/")
    args = parser.parse_args(argv)
    try:
        target = args.target.resolve() if args.target else installed()
        if args.check:
            applied = is_applied(target)
            print(f"{target}: the series is {'' if applied else 'not '}applied")
            return 0 if applied else 1
        if args.write_series:
            write_series(target)
            return 0
        if args.target is None and input(f"Change SGLang in {target}? [y/N] ").lower() != "y":
            print("nothing was changed")
            return 1
        changed = change(target, args.revert)
    except (PatchError, EOFError) as error:
        print(f"error: {error or 'no answer'}", file=sys.stderr)
        return 2
    state = "reverted" if args.revert else "applied"
    print(f"{target}: the series {'is now' if changed else 'was already'} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

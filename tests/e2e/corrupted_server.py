"""A server whose splices are wrong: SGLang's processes import this module before anything else."""

from rksc_sglang.kernels import rotate_copy as kernel

_right = kernel.rotate_copy


def _wrong(k_caches, v_caches, source, target, rotation):
    _right(k_caches, v_caches, source, target, rotation)
    for cache in v_caches:
        cache[target] *= -1


kernel.rotate_copy = _wrong

if __name__ == "__main__":
    from rksc_sglang.launch_server import main

    main()

import pytest

from rksc_sglang import compat


@pytest.mark.parametrize("seam", compat.SEAMS, ids=lambda seam: seam.method)
def test_sglang_has_every_seam(seam):
    compat.check_seam(seam)


@pytest.mark.parametrize(
    "seam",
    [
        compat.Seam("sglang.srt.managers.scheduler.NoScheduler", "run", ()),
        compat.Seam("sglang.srt.managers.scheduler.Scheduler", "no_such_method", ()),
        compat.Seam("sglang.srt.managers.scheduler.Scheduler", "get_init_info", ("verbose",)),
    ],
)
def test_a_moved_seam_is_named(seam):
    with pytest.raises(compat.CompatError) as error:
        compat.check_seam(seam)
    assert seam.owner in str(error.value)


def test_another_sglang_is_refused(monkeypatch):
    monkeypatch.setattr("sglang.__version__", "0.5.24")
    with pytest.raises(compat.CompatError, match=r"0\.5\.23.*0\.5\.24"):
        compat.check_version()


def test_a_plugin_that_did_not_run_is_noticed():
    # This process loaded no plugin, so SGLang's scheduler is its own.
    with pytest.raises(compat.CompatError, match="scheduler was not replaced"):
        compat.check_registrations()


def test_the_interpreter_hook_notices_an_executor_that_ignores_nodes():
    from rksc_sglang.lang.node import SglVerdict

    class Deaf:
        def submit(self, expr):
            pass

    with pytest.raises(compat.CompatError, match="_execute"):
        compat._check_stream_executor(Deaf(), SglVerdict)


def test_the_finalizer_hook_notices_a_state_that_is_ended_in_place():
    import rksc_sglang.lang  # noqa: F401

    class Stock:
        def __init__(self, stream_executor):
            self.stream_executor = stream_executor

        def __del__(self):
            self.stream_executor.end()

    with pytest.raises(compat.CompatError, match="__del__"):
        compat._check_finalizers(Stock)

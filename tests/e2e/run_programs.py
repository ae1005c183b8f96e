"""Run SGLang's own test programs against a server: ``run_programs.py URL [NAME ...]`` prints JSON.

Each program's outcome is "ran", the name of the exception, or "hangs": stock SGLang's interpreter
waits for ever in a program that appends to a state that has failed.
"""

import inspect
import json
import os
import sys
import threading
import time
import warnings

HANGS_AFTER_SECONDS = 45


def main(url: str, *chosen: str) -> None:
    warnings.simplefilter("ignore")
    import sglang as sgl
    from sglang.test import test_programs

    sgl.set_default_backend(sgl.RuntimeEndpoint(url, chat_template_name="chatml"))
    programs = {
        name: program
        for name, program in vars(test_programs).items()
        if name.startswith("test_") and inspect.isfunction(program)
        if not chosen or name in chosen
    }
    outcomes = dict.fromkeys(programs, "hangs")

    def run(name):
        program = programs[name]
        # A tiny model answers nothing right; what counts is that the program runs.
        options = inspect.signature(program).parameters.keys() & {"check_answer"}
        try:
            program(**dict.fromkeys(options, False))
            outcomes[name] = "ran"
        except AssertionError:
            outcomes[name] = "ran"  # What it checks is the answer, which chance decides here.
        except Exception as error:
            outcomes[name] = type(error).__name__

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in programs]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + HANGS_AFTER_SECONDS
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    print("\n" + json.dumps(outcomes), flush=True)
    os._exit(0)  # Past the threads that hang.


if __name__ == "__main__":
    main(*sys.argv[1:])

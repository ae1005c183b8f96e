"""SGLang's own frontend programs fare on our server as they fare on stock."""

import json
import subprocess
import sys
from pathlib import Path


def start(url, names):
    script = Path(__file__).with_name("run_programs.py")
    command = [sys.executable, script, url, *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_every_program_has_stocks_outcome(rksc_tiny, stock_tiny):
    ours, stock, differ = {}, {}, []
    for _ in range(8):  # programs that sample fare as chance has it, on stock too
        running = [start(rksc_tiny, differ), start(stock_tiny, differ)]
        for outcomes, process in zip((ours, stock), running):
            outcomes.update(json.loads(process.communicate()[0].splitlines()[-1]))
        differ = [name for name in stock if ours.get(name) != stock[name]]
        if not differ:
            break
    assert ours == stock
    print(ours)
    assert list(ours.values()).count("ran") >= 8, ours

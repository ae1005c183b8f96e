"""SGLang's own frontend programs fare on our server as they fare on stock."""

import json
import subprocess
import sys
from pathlib import Path


def start(url):
    script = Path(__file__).with_name("run_programs.py")
    return subprocess.Popen([sys.executable, script, url], stdout=subprocess.PIPE, text=True)


def test_every_program_has_stocks_outcome(rksc_tiny, stock_tiny):
    for _ in range(3):  # programs that sample fare as chance has it, on stock too
        running = [start(rksc_tiny), start(stock_tiny)]
        ours, stock = (json.loads(p.communicate()[0].splitlines()[-1]) for p in running)
        if ours == stock:
            break
    assert ours == stock
    print(ours)
    assert list(ours.values()).count("ran") >= 8, ours

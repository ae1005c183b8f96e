"""SGLang's own frontend programs fare on our server as they fare on stock."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


def start(url, names):
    script = Path(__file__).with_name("run_programs.py")
    command = [sys.executable, script, url, *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_every_program_has_stocks_outcome(rksc_tiny, stock_tiny):
    ours, stock = defaultdict(set), defaultdict(set)
    differ = []
    for _ in range(8):  # programs that sample fare as chance has it, on stock too
        running = [start(rksc_tiny, differ), start(stock_tiny, differ)]
        for outcomes, process in zip((ours, stock), running):
            for name, outcome in json.loads(process.communicate()[0].splitlines()[-1]).items():
                outcomes[name].add(outcome)
        differ = [name for name in stock if not ours[name] & stock[name]]
        if not differ:
            break
    assert ours.keys() == stock.keys()
    assert not differ, {name: (ours[name], stock[name]) for name in differ}
    print(dict(ours))
    assert sum("ran" in outcomes for outcomes in ours.values()) >= 8, ours

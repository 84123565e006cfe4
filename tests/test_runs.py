"The README's first command, at the size of a test: files, schema, and a second run that changes nothing."
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent


def papermill(folder, *options):
    command = [sys.executable, '-m', 'papermill', 'nbs/05_post_train.ipynb', str(folder/'out.ipynb'), '--no-progress-bar',
               '-p', 'preset', 'smoke', '-p', 'out', str(folder/'figures'), *options]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_first_command(tmp_path):
    assert (ROOT/'runs').is_dir()                                        # papermill does not make it
    done = papermill(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(tmp_path/'figures/smoke/post_training.csv')
    assert list(table.columns) == ['decoder', 'gfid', 'gfid_minus_control', 'rfid', 'samples', 'features', 'n']
    assert list(table.decoder) == ['before', 'σ = 1', 'σ = 0.9'] and table.gfid.gt(0).all()
    record = json.loads((tmp_path/'figures/smoke/post_training.json').read_text())
    for key in ('preset', 'sizes', 'seed', 'commit', 'versions', 'device', 'seconds', 'peak_memory_gib', 'stages'):
        assert key in record
    assert record['preset'] == 'smoke' and len(record['stages']) == 4
    assert (tmp_path/'figures/smoke/post_training.png').stat().st_size > 5000
    again = tmp_path/'again'
    again.mkdir()
    assert papermill(again).returncode == 0
    assert pd.read_csv(again/'figures/smoke/post_training.csv').equals(table)


def test_unknown_preset_is_named(tmp_path):
    done = papermill(tmp_path, '-p', 'preset', 'huge')
    assert done.returncode != 0 and "got 'huge'" in done.stderr

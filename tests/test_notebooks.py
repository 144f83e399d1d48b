"Every notebook, executed from top to bottom in a process of its own"
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('[!_.]*.ipynb') if not any(part.startswith(('.', '_'))
        for part in p.parts))

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_notebook_runs(notebook):
    env = {**os.environ, 'AMULET_PROGRESS': 'off'}
    done = subprocess.run([sys.executable, ROOT/'tests'/'notebook.py', notebook], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode==0, f'{done.stdout[-2000:]}\n{done.stderr[-6000:]}'

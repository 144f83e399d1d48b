"""Executes one notebook, as `nbdev_test` does, with its exported cells compiled as lines of the module they are
exported to.

So coverage counts a lesson for the code that it teaches, and a traceback names the module's line: python
tests/notebook.py nbs/10_data/70_split.ipynb
"""
import ast
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {'gpu'} # Flags of cells that need what a plain machine lacks

def module_file(nb) -> Path|None:
    "File that a notebook is exported to"
    for cell in nb.cells:
        if found := re.search(r'^#\s*\|\s*default_exp\s+(\S+)', cell.source, re.M):
            return ROOT/'amulet_hybrid'/f'{found[1].replace(".", "/")}.py'
    return None

def first_lines(path) -> dict[str,int]: # Id of a cell -> line of the module behind which its source begins
    "Where each exported cell stands in its module"
    lines = path.read_text(encoding='utf-8').splitlines()
    return {m[1]: i for i,line in enumerate(lines, 1) if (m := re.match(r'# %% \S+ #(\w+)$', line))}

def imports_only(source) -> bool:
    "Whether a cell only imports: exported, its imports are relative, so it runs as it stands"
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)

def run_cell_of_module(shell, source, path, line):
    "Execute an exported cell as the lines of its module"
    tree = ast.parse(source)
    ast.increment_lineno(tree, line)
    exec(compile(tree, str(path), 'exec'), shell.user_ns)

def run_notebook(path:Path) -> tuple[bool,float]: # Whether it ran, and its seconds
    "Execute all cells but those that are flagged"
    os.environ['IN_TEST'] = '1'
    nb = NBProcessor(path, process=True).nb
    home,shell = module_file(nb),CaptureShell(path)
    places = first_lines(home) if home else {}
    exported = {cell.idx_: (cell.id, cell.source)
                for cell in nb.cells if 'export' in (getattr(cell, 'directives_', None) or {})}
    shell.user_ns['_run_exported'] = lambda idx: run_cell_of_module(shell, exported[idx][1], home,
                                                                    places[exported[idx][0]])
    def skip(cell):
        if cell.cell_type!='code': return True
        directives = getattr(cell, 'directives_', None) or {}
        if directives.get('eval:', [''])[0].lower()=='false' or SKIPPED & directives.keys(): return True
        if cell.idx_ in exported and cell.id in places and not imports_only(cell.source):
            cell.source = f'_run_exported({cell.idx_})'
        return False
    start = time.monotonic()
    try:
        with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=skip)
    except Exception:
        sys.stderr.write(shell.prettytb(fname=path)+'\n')
        return False,time.monotonic()-start
    return True,time.monotonic()-start

def run_in_fork(path:str, output:str):
    "`run_notebook` as the target of a forked process: its output, and that of processes it starts, goes to a file"
    with open(output, 'wb') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ['AMULET_PROGRESS'] = 'off'
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True) # the usual one, not the one that made this process
    measured = None
    if os.environ.get('MEASURE_NOTEBOOKS'): # a fork that begins without it, so nothing else is slowed by it
        from coverage import Coverage
        measured = Coverage(config_file=str(ROOT/'pyproject.toml'), data_suffix=True)
        measured.start()
    passed = run_notebook(Path(path))[0]
    if multiprocessing.active_children(): # joblib's, which are idle for five minutes before they end by themselves
        from joblib.externals.loky import get_reusable_executor
        get_reusable_executor().shutdown(wait=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if measured: # a fork ends without `atexit`
        measured.stop()
        measured.save()
    sys.exit(not passed)

if __name__=='__main__':
    passed,seconds = run_notebook(Path(sys.argv[1]).resolve())
    print(f'{sys.argv[1]}: {seconds:.0f} s')
    sys.exit(not passed)

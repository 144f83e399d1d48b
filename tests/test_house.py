"The rules of the house: floors, light imports, clean notebooks, papers that are true"
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import amulet_hybrid

ROOT = Path(__file__).resolve().parent.parent
PACKAGE,NBS = ROOT/'amulet_hybrid',ROOT/'nbs'
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
RUNS = [p for p in NOTEBOOKS if p.parent.name=='runs']

def cells(notebook): return json.loads(notebook.read_text(encoding='utf-8'))['cells']

def module_notebooks():
    "Notebooks that export a module: `core`, and those in the numbered folders"
    return sorted((*NBS.glob('[0-9]*.ipynb'), *NBS.glob('[0-9]*/[0-9]*.ipynb')), key=lambda p: p.relative_to(NBS).parts)

def number(name): return int(name.split('_')[0])

def floors():
    "Module name -> (number of its folder, number inside it)"
    out = {}
    for notebook in module_notebooks():
        for cell in cells(notebook):
            if found := re.search(r'^#\s*\|\s*default_exp\s+(\S+)', ''.join(cell['source']), re.M):
                out[found[1]] = tuple(number(part) for part in notebook.relative_to(NBS).parts)
    return out

def modules():
    """Module name -> file, of all that is exported; steps from one version of the tables to the next are files of
    Alembic"""
    files = (p.relative_to(PACKAGE) for p in sorted(PACKAGE.rglob('*.py')) if p.name not in ('__init__.py',
            '_modidx.py'))
    return {'.'.join(p.with_suffix('').parts): PACKAGE/p for p in files if 'migrations' not in p.parts}

def imports(path, name):
    "(module, star) of every import of a file, the relative ones made absolute"
    package = ['amulet_hybrid', *name.split('.')[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package)-node.level+1]
                            + ([node.module] if node.module else [])) if node.level else node.module
            for alias in node.names:
                below = f'{base}.{alias.name}'.removeprefix('amulet_hybrid.')
                yield (f'amulet_hybrid.{below}' if base.startswith('amulet_hybrid') and below in modules()
                       else base), alias.name=='*'

def loaded(code, *unwanted):
    "Which of the packages `unwanted` are loaded after `code`"
    program = f'import sys\n{code}\nprint([m for m in {unwanted!r} if m in sys.modules])'
    return ast.literal_eval(subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True,
                                           check=True).stdout)

def test_every_module_has_its_notebook(): assert set(modules())==set(floors())

@pytest.mark.parametrize('name', modules())
def test_imports_only_from_below(name):
    floor = floors()
    ours = {m.removeprefix('amulet_hybrid.')
            for m,_ in imports(modules()[name], name) if m.startswith('amulet_hybrid.')}
    assert {m for m in ours if floor[m] >= floor[name]}==set()

def arrows():
    "(folder, folder it imports from), of all modules"
    for name,path in modules().items():
        ours = {m.removeprefix('amulet_hybrid.').split('.')[0]
                for m,_ in imports(path, name) if m.startswith('amulet_hybrid.')}
        yield from ((name.split('.')[0], part) for part in ours-{name.split('.')[0]})

def test_the_house_can_be_drawn():
    "Few parts, few arrows between them"
    assert len({name.split('.')[0] for name in modules()}) <= 20
    assert len(set(arrows())) <= 70

def test_the_service_imports_only_what_answers():
    parts = {b for a,b in arrows() if a=='serve'}
    assert parts <= {'core', 'base', 'data', 'features', 'learn', 'model', 'store'}, parts
    away = ('torch', 'sklearn', 'pandas', 'matplotlib') # not to be had where a bundle is served
    code = (f'import sys; sys.modules.update(dict.fromkeys({away!r}))\nimport amulet_hybrid.serve.app, '
            f'amulet_hybrid.model.classifier')
    assert [m for m in loaded(code, *away) if m not in away]==[]

def functions():
    "(module, function) of the package"
    for name,path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): yield name,node

def test_no_function_takes_over_ten_arguments():
    count = {f'{name}.{f.name}': len([a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)
                                      if a.arg not in ('self', 'cls')])
             for name,f in functions()}
    # of these two each argument is a setting that a block's name can give, as an estimator of scikit-learn has them
    extractors = {'features.cnn.__init__': 11, 'features.user_net.__init__': 11}
    assert {k: n for k,n in count.items() if n > extractors.get(k, 10)}=={}

def test_blocks_are_not_told_apart_by_their_names():
    assert not [name for name,path in modules().items()
                if re.search(r"startswith\(\(?['\"]cnn", path.read_text(encoding='utf-8'))]

@pytest.mark.parametrize('name', modules())
def test_imports_are_named_and_ours_to_ship(name):
    found = list(imports(modules()[name], name))
    assert not any(star for _,star in found)
    assert not {m.split('.')[0] for m,_ in found} & {'fastcore', 'nbdev', 'execnb'}

def test_init_holds_the_version_and_the_names_people_start_with():
    version = re.search(r'^version = (\S+)', (ROOT/'settings.ini').read_text(encoding='utf-8'), re.M)[1]
    assert f'__version__ = "{version}"' in (PACKAGE/'__init__.py').read_text(encoding='utf-8').splitlines()
    names = ('train', 'load', 'inspect', 'HybridClassifier', 'TrainingRun', 'make_samples')
    assert all(callable(getattr(amulet_hybrid, name)) for name in names)
    assert set(amulet_hybrid.__all__) <= set(dir(amulet_hybrid))
    with pytest.raises(AttributeError, match='tarin'): amulet_hybrid.tarin # noqa: B018
    assert all(p.read_text(encoding='utf-8').strip()=='' for p in PACKAGE.glob('*/__init__.py'))

def test_import_is_light(): assert loaded('import amulet_hybrid', 'torch', 'fastapi', 'cv2', 'numpy', 'pandas')==[]

def test_command_line_starts_light():
    assert loaded('import amulet_hybrid.cli.app', 'torch', 'sklearn', 'cv2', 'pandas', 'fastapi', 'matplotlib',
                  'numpy')==[]

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_small_and_whole(notebook):
    assert notebook.stat().st_size < 200_000
    outputs = [o for cell in cells(notebook) for o in cell.get('outputs', [])]
    assert not [o for o in outputs if o['output_type']=='error']

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_names_no_machine(notebook):
    "Outputs hold no path of the machine that made them"
    outputs = json.dumps([cell.get('outputs', []) for cell in cells(notebook)])
    places = [f'{p}{os.sep}' for p in (ROOT, Path.home()) if p!=Path(p.anchor)]
    assert not [p for p in (*places, 'site-packages') if p in outputs]

def test_notebook_lies_where_its_module_does():
    for notebook in module_notebooks():
        name = re.search(r'^#\s*\|\s*default_exp\s+(\S+)', ''.join(cells(notebook)[1]['source']), re.M)[1]
        assert '.'.join(p.split('_', 1)[1] for p in notebook.relative_to(NBS).with_suffix('').parts)==name

def test_numbers_are_given_once():
    for folder in [NBS, *NBS.glob('[0-9]*/')]:
        numbers = [number(p.name) for p in folder.iterdir() if re.match(r'\d\d_', p.name)]
        assert len(numbers)==len(set(numbers))

def test_table_of_modules_is_true(tmp_path):
    subprocess.run([sys.executable, ROOT/'docs'/'pages.py', 'modules', tmp_path], cwd=ROOT, check=True)
    made,ours = ((folder/'CONTRIBUTING.md').read_text(encoding='utf-8') for folder in (tmp_path, ROOT))
    assert made==ours

@pytest.mark.parametrize('link', [NBS/'_quarto.yml', PACKAGE/'runs'], ids=lambda p: p.name)
def test_links_are_relative(link):
    assert link.is_symlink() and link.exists() and not Path(os.readlink(link)).is_absolute()

def test_readme_is_what_make_readme_makes(tmp_path):
    subprocess.run([sys.executable, ROOT/'docs'/'pages.py', 'readme', tmp_path], cwd=ROOT, check=True)
    assert (tmp_path/'README.md').read_text(encoding='utf-8')==(ROOT/'README.md').read_text(encoding='utf-8')

def test_there_is_a_run(): assert (PACKAGE/'runs'/'train.ipynb').is_file()

@pytest.mark.parametrize('notebook', RUNS, ids=lambda p: p.name)
def test_parameters_survive_cleaning(notebook, tmp_path):
    "papermill finds its cell by the tag; without it the run would silently use the defaults"
    shutil.copy(ROOT/'settings.ini', tmp_path)
    copy = tmp_path/'nbs'/'runs'/notebook.name
    copy.parent.mkdir(parents=True)
    shutil.copy(notebook, copy)
    subprocess.run([BIN/'nbdev_clean', '--fname', copy], cwd=tmp_path, check=True)
    assert len([cell for cell in cells(copy) if 'parameters' in cell['metadata'].get('tags', [])])==1

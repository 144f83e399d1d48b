"""The documentation site as far as it is made without Quarto: pages are processed, everything public is documented,
links lead somewhere"""
import dataclasses
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT/'docs'
sys.path.insert(0, str(DOCS))
import pages  # noqa: E402
import renderer  # noqa: E402


@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "Folder of the processed notebooks, made by nbdev from a copy"
    copy = tmp_path_factory.mktemp('site')
    for name in ('settings.ini', 'pyproject.toml', '_quarto.yml', 'README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'):
        shutil.copy(ROOT/name, copy)
    shutil.copytree(ROOT/'nbs', copy/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.*', 'samples'))
    # a copy: nbdev writes its index of names anew
    shutil.copytree(ROOT/'amulet_hybrid', copy/'amulet_hybrid', symlinks=True,
                    ignore=shutil.ignore_patterns('__pycache__'))
    (copy/'benchmarks').symlink_to(ROOT/'benchmarks')
    pages.write_sidebar(copy/'nbs')
    (copy/'bin').mkdir()
    (copy/'bin'/'quarto').touch(0o755) # is not run here; where there is none, nbdev would install it, and the package
    env = {**os.environ, 'PYTHONPATH': f'{DOCS}{os.pathsep}{ROOT}', 'AMULET_PROGRESS': 'off',
           'PATH': f'{copy/"bin"}{os.pathsep}{os.environ["PATH"]}'}
    # `nbdev_proc_nbs` without its end, at which each of 171 shells collects garbage: two thirds of the time
    run = 'import os; from nbdev.quarto import nbdev_proc_nbs; nbdev_proc_nbs(); os.sys.stdout.flush(); os._exit(0)'
    command = [sys.executable, '-c', run, '--file_re', r'\.(ipynb|qmd)$', '--n_workers', '0']
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    said = done.stdout+done.stderr
    assert done.returncode==0 and 'Error in' not in said, said[-4000:]
    assert 'Found cells containing imports and other code' not in said, said[:4000]
    return copy/'_proc'

def module_pages(processed):
    "Module -> text of its page: markdown cells, and markdown that `show_doc` put out"
    for path in sorted((ROOT/'nbs').rglob('[0-9]*.ipynb')):
        source = json.loads(path.read_text(encoding='utf-8'))['cells']
        found = re.search(r'default_exp (\S+)', ''.join(source[1]['source']))
        if not found: continue
        cells = json.loads((processed/path.relative_to(ROOT/'nbs')).read_text(encoding='utf-8'))['cells']
        outputs = [''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', [])]
        yield f'amulet_hybrid.{found[1]}', '\n'.join(outputs)

def public(module):
    "Public functions and classes that a module defines"
    for name in module.__all__:
        value = getattr(module, name)
        ours = value.__module__==module.__name__ if inspect.isclass(value) or inspect.isfunction(value) else False
        if ours and not name.startswith('_'):
            yield name,value

def missing_words(name, value):
    "What is public in a function or class, and not explained"
    if not inspect.getdoc(value): yield f'{name}: no docstring'
    targets = {name: value} if inspect.isfunction(value) else {f'{name}.{k}': v
                                                               for k,v in renderer.public_methods(value).items()}
    for title,found in targets.items():
        function = getattr(found, '__func__', getattr(found, 'fget', getattr(found, 'func', found)))
        if not inspect.getdoc(function): yield f'{title}: no docstring'
        table = renderer.parameter_table(function)
        for line in table.splitlines()[2:]:
            parameter,*_,meaning = [c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]]
            if not meaning and parameter!='**returns**': yield f'{title}: nothing is said of {parameter}'
    if dataclasses.is_dataclass(value):
        for line in renderer.field_table(value).splitlines()[2:]:
            field,*_,meaning = [c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]]
            if not meaning: yield f'{name}: nothing is said of the field {field}'

def test_everything_public_has_its_words():
    lacking = []
    for path in sorted((ROOT/'amulet_hybrid').rglob('*.py')):
        if path.stem.startswith('_') or 'migrations' in path.parts: continue
        module = importlib.import_module('amulet_hybrid.'
                                         +'.'.join(path.relative_to(ROOT/'amulet_hybrid').with_suffix('').parts))
        for name,value in public(module): lacking += [f'{module.__name__}.{w}' for w in missing_words(name, value)]
    assert not lacking, f'{len(lacking)} are missing:\n'+'\n'.join(lacking)

def test_everything_public_is_on_the_site(processed):
    lacking,methods = [],0
    for name,text in module_pages(processed):
        for symbol,value in public(importlib.import_module(name)):
            if f'# {symbol}\n' not in text: lacking.append(f'{name}.{symbol}')
            if not inspect.isclass(value): continue
            for method in renderer.public_methods(value):
                methods += 1
                if f'# {symbol}.{method}\n' not in text: lacking.append(f'{name}.{symbol}.{method}')
            fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
            lacking += [f'{name}.{symbol}.{f.name}'
                        for f in fields if not f.name.startswith('_') and f'| <code>{f.name}</code> |' not in text]
    assert methods > 300
    assert not lacking, f'{len(lacking)} are missing:\n'+'\n'.join(lacking)

def test_back_ticks_link_to_what_is_meant(processed):
    "A word of prose must not lead to a command, a helper of a test or a page that is not there"
    wrong = []
    for path in processed.rglob('*.ipynb'):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type']!='markdown': continue
            for name,url in re.findall(r'\[`([^`]+)`\]\((\S+?)\)', ''.join(cell['source'])):
                page = re.sub(r'^https?://[^/]+/[^/]+/|#.*$', '', url)
                there = not page or any((ROOT/'nbs').rglob(f'*{Path(page).stem}.ipynb'))
                if ('_cli/' in url and '_' not in name) or not there: wrong.append(f'{path.name}: `{name}` -> {url}')
    assert not wrong, '\n'.join(sorted(set(wrong)))

def test_introductions_are_kept(processed):
    "nbdev makes a title of the first cell and drops what else stands in it"
    home = json.loads((processed/'index.ipynb').read_text(encoding='utf-8'))['cells']
    assert 'on a laptop CPU, without a network' in ''.join(''.join(c['source']) for c in home)
    for path in (ROOT/'nbs').rglob('[!.]*.ipynb'):
        first = ''.join(json.loads(path.read_text(encoding='utf-8'))['cells'][0]['source'])
        assert not [line for line in first.splitlines() if line.strip() and line[:2] not in ('# ', '> ')], path.name

def test_sidebar_holds_every_page():
    hrefs = re.findall(r"'href': '([^']+)'", repr(pages.sections(ROOT/'nbs')))
    assert hrefs==sorted(p.relative_to(ROOT/'nbs').as_posix()
                         for p in (ROOT/'nbs').rglob('[0-9]*.ipynb') if 'checkpoint' not in p.as_posix())

@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "Folder with the generated reference pages"
    folder = tmp_path_factory.mktemp('reference')
    pages.write_reference(folder)
    return {p.stem: p.read_text(encoding='utf-8') for p in (folder/'reference').glob('*.qmd')}

def test_reference_pages(reference):
    assert set(reference)==set(pages.REFERENCE)
    assert all(f'## `amulet {c}`' in reference['command_line']
               for c in ('train', 'run', 'predict', 'serve', 'deploy', 'store export', 'bundle sign'))
    assert '## `POST /predict/file`' in reference['http_api'] and 'error_code' in reference['http_api']
    assert '`AMULET_DATABASE_URL`' in reference['service_settings'] and '`trials`' in reference['run_settings']
    assert '`report.html`' in reference['run_files'] and '`manifest.json`' in reference['run_files']

def test_every_error_code_is_listed(reference):
    "Whatever is given as `code=` to an error stands on the page"
    source = '\n'.join(p.read_text(encoding='utf-8') for p in (ROOT/'amulet_hybrid').rglob('*.py') if p.stem!='_modidx')
    codes = set(re.findall(r"Error\([^#\n]*?code='(\w+)'", source))
    assert len(codes) > 60
    assert not [c for c in codes if f'| `{c}` |' not in reference['error_codes']]

def commands():
    "Every `amulet` line of README and guides"
    for path in (ROOT/'README.md', *(ROOT/'nbs'/'guides').glob('*.qmd')):
        for line in re.findall(r'^    (amulet .+)$', path.read_text(encoding='utf-8'), re.M): yield path.name,line

@pytest.mark.parametrize('line', sorted({line for _,line in commands()}))
def test_commands_in_the_docs_exist(line):
    words = line.split()[1:]
    path = []
    for word in words:
        if word.startswith('-') or not re.fullmatch('[a-z]+', word) or len(path)==2: break
        path.append(word)
    for k in range(len(path), 0, -1): # `amulet predict folder`: a word may be an argument
        try: text = pages.amulet(*path[:k], '--help')
        except SystemExit: continue
        if k==len(path) or 'Commands:' not in text: break
    options = [w.split('=')[0] for w in words if w.startswith('--')]
    assert not [o for o in options if o not in text], text[:1500]

def test_links_between_pages():
    "Relative links of README, CONTRIBUTING and guides lead to files that are there"
    lost = []
    generated = {f'reference/{name}.qmd' for name in pages.REFERENCE}
    for path in (ROOT/'README.md', ROOT/'CONTRIBUTING.md', *(ROOT/'nbs'/'guides').glob('*.qmd')):
        for target in re.findall(r'\]\(([^)#\s]+)', path.read_text(encoding='utf-8')):
            if re.match(r'https?:|mailto:', target): continue
            base = path.parent
            if not (base/target).exists() and not any(target.endswith(g) for g in generated):
                lost.append(f'{path.name}: {target}')
    assert not lost

def test_pages_fetch_nothing(tmp_path):
    "What Quarto adds from a CDN is taken out, and what is left of it is an error"
    page = tmp_path/'page.html'
    cdn = '<script src="https://cdnjs.example/require.min.js"></script>'
    page.write_text(f'<head>{cdn}<link rel="canonical" href="https://example.org/"></head><a '
                    f'href="https://example.org">away</a>', encoding='utf-8')
    (tmp_path/'site.css').write_text('@import "https://fonts.example/x.css"; p {}', encoding='utf-8')
    pages.tidy(tmp_path)
    assert 'cdnjs' not in page.read_text(encoding='utf-8') and 'away' in page.read_text(encoding='utf-8')
    assert 'fonts.example' not in (tmp_path/'site.css').read_text(encoding='utf-8')
    page.write_text('<img src="https://example.org/x.png">', encoding='utf-8')
    with pytest.raises(SystemExit, match='page.html'): pages.tidy(tmp_path)

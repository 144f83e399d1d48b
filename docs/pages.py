"""What the documentation site has beside the notebooks: sidebar, version, reference pages, a check of rendered pages.

    python docs/pages.py sidebar nbs      # site.yml: sidebar by folder with spoken titles, version in the navbar
    python docs/pages.py reference _proc  # reference/*.qmd: command line, HTTP API, settings, error codes, files
    python docs/pages.py readme .         # README.md from nbs/index.ipynb
    python docs/pages.py modules .        # the table of modules in CONTRIBUTING.md, from the notebooks' first lines
    python docs/pages.py tidy _docs       # what pages would fetch from elsewhere is taken out
"""
import ast
import contextlib
import csv
import io
import json
import os
import re
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'amulet_hybrid'

# ---------------------------------------------------------------- sidebar

FOLDERS = {'base': 'Base', 'data': 'Data', 'features': 'Features', 'learn': 'Learning', 'evaluate': 'Evaluation',
           'model': 'Model',
           'audit': 'Audit of a folder', 'augment': 'Augmentation', 'store': 'Records', 'serve': 'Service',
           'monitor': 'Monitoring', 'ui': 'Workbench',
           'deploy': 'Deployment', 'jobs': 'Jobs', 'cli': 'Command line', 'tutorials': 'Tutorials', 'runs': 'Runs',
           'guides': 'Guides'}
WORDS = {'cnn': 'CNN', 'ood': 'OOD', 'html': 'HTML', 'openapi': 'OpenAPI', 'api': 'API'}

def spoken(name) -> str: # 'out_of_fold' -> 'Out of fold'
    "Title of a page from the name of its module"
    words = [WORDS.get(w, w) for w in name.split('_')]
    return ' '.join([words[0] if words[0] in WORDS.values() else words[0].capitalize(), *words[1:]])

def plain_name(name) -> str: # '20_split.ipynb' -> 'split'
    "Name without the number and the ending"
    return re.sub(r'^\d+_', '', name.rsplit('.', 1)[0])

def sections(nbs) -> list[dict]:
    "Sidebar: the core, then a section a folder, in the order of the numbers"
    out:list[dict] = [{'text': 'Core', 'href': '00_core.ipynb'}]
    for folder in sorted(p for p in Path(nbs).iterdir() if p.is_dir() and re.match(r'\d\d_', p.name)):
        pages = [{'text': spoken(plain_name(p.name)), 'href': f'{folder.name}/{p.name}'}
                 for p in sorted(folder.glob('[0-9]*.ipynb'))]
        out.append({'section': FOLDERS[plain_name(folder.name)], 'contents': pages})
    return out

def project() -> dict[str,str]:
    "settings.ini"
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return dict(parser['DEFAULT'])

def write_sidebar(nbs):
    "site.yml beside the notebooks"
    about = project()
    guides = [{'text': spoken(plain_name(p.name)), 'href': f'guides/{p.name}'}
              for p in sorted((Path(nbs)/'guides').glob('*.qmd'))]
    lessons = [{'text': spoken(plain_name(p.name)), 'href': f'tutorials/{p.name}'}
               for p in sorted((Path(nbs)/'tutorials').glob('*.ipynb'))]
    reference = [{'text': title, 'href': f'reference/{name}.qmd'} for name,(title,_) in REFERENCE.items()]
    bars = [{'id': 'guides', 'title': 'Guides', 'style': 'docked', 'contents': [
                {'text': 'Start', 'href': 'index.ipynb'}, {'section': 'Tutorials', 'contents': lessons},
        {'section': 'How-to', 'contents': guides},
                {'section': 'Contribute', 'contents': [{'text': 'How to work on it', 'href': 'CONTRIBUTING.md'},
                                                       {'text': 'Changes', 'href': 'CHANGELOG.md'}]}]},
            {'id': 'reference', 'title': 'Reference', 'style': 'docked',
             'contents': [{'section': 'Generated', 'contents': reference}, *sections(nbs)]}]
    right = [{'icon': 'github', 'href': about['git_url'], 'aria-label': 'Repository'},
             {'text': f'v{about["version"]}', 'href': 'CHANGELOG.md'}]
    site = {'website': {'navbar': {'right': right}, 'sidebar': bars}}
    # JSON is YAML
    (Path(nbs)/'site.yml').write_text('# written by docs/pages.py\n'+json.dumps(site, indent=2, ensure_ascii=False)
                                      +'\n', encoding='utf-8')

# ---------------------------------------------------------------- reference pages

def page(title, description, body) -> str:
    "A page of Quarto"
    return f'---\ntitle: {json.dumps(title)}\ndescription: {json.dumps(description)}\n---\n\n{body}\n'

def markdown_table(header, rows) -> str:
    "A table of markdown; bars and line ends inside of cells are made harmless"
    def line(cells): return '| '+' | '.join(' '.join(str(c).split()).replace('|', '\\|') for c in cells)+' |'
    return '\n'.join([line(header), line(['---']*len(header)), *map(line, rows)])

@cache
def amulet(*words) -> str:
    "What the command prints, at a width that a page can show; in this process, for starting one takes a second"
    from amulet_hybrid.cli.app import app
    shown,env = io.StringIO(),{**os.environ, 'COLUMNS': '96', 'TERMINAL_WIDTH': '96', 'NO_COLOR': '1'}
    with mock.patch.dict(os.environ, env), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try: app(words, prog_name='amulet')
        except SystemExit as end:
            if not end.code: return shown.getvalue().strip()
            raise SystemExit(f'amulet {" ".join(words)} ended with {end.code}:\n{shown.getvalue()[-2000:]}') from end
    return shown.getvalue().strip()

def subcommands(help_text) -> list[str]:
    "Names under `Commands:` in a help text"
    _,there,rest = help_text.partition('Commands:')
    return re.findall(r'^  (\S+)(?:\s|$)', rest, re.M) if there else []

def command_line() -> str:
    "The help of every command"
    parts,waiting = [],[()]
    while waiting:
        words = waiting.pop(0)
        text = amulet(*words, '--help')
        name = ' '.join(('amulet', *words))
        parts.append(f'## `{name}`\n\n```text\n{text}\n```' if words else f'```text\n{text}\n```')
        waiting = [(*words, sub) for sub in subcommands(text)]+waiting
    return '\n\n'.join(parts)

def schema_words(schema) -> str:
    "Type of an OpenAPI schema, in a few words"
    if '$ref' in schema:
        name = schema['$ref'].rsplit('/', 1)[-1]
        return f'[{name}](#{name.lower()})'
    if options := schema.get('anyOf') or schema.get('oneOf'):
        return ' or '.join(dict.fromkeys(schema_words(s) for s in options))
    if schema.get('type')=='array': return f'list of {schema_words(schema.get("items", {}))}'
    if 'enum' in schema: return 'one of '+', '.join(f'`{v}`' for v in schema['enum'])
    if schema.get('type')=='object' and isinstance(schema.get('additionalProperties'), dict):
        return f'map to {schema_words(schema["additionalProperties"])}'
    return schema.get('format') or schema.get('type') or 'any'

def fields_of(schema) -> str: # '' without fields
    "Table of the fields of an object"
    must = schema.get('required', [])
    rows = [[f'`{name}`', schema_words(s), 'yes' if name in must else '', s.get('description', '')]
            for name,s in schema.get('properties', {}).items()]
    return markdown_table(['field', 'type', 'required', 'meaning'], rows) if rows else ''

def operation(method, path, op) -> str:
    "One address: what it takes, what it answers, how it refuses"
    parts = [f'## `{method.upper()} {path}`', op.get('summary', ''), op.get('description', '')]
    if ps := op.get('parameters'):
        parts.append(markdown_table(['parameter', 'in', 'type', 'meaning'],
                                    [[f'`{p["name"]}`', p['in'], schema_words(p.get('schema', {})),
                                      p.get('description', '')] for p in ps]))
    for kind,body in op.get('requestBody', {}).get('content', {}).items():
        parts.append(f'Body, `{kind}`: {schema_words(body.get("schema", {}))}')
    answers = [[f'`{code}`', ', '.join(schema_words(c.get('schema', {})) for c in a.get('content', {}).values()),
                a.get('description', '')]
               for code,a in op.get('responses', {}).items()]
    parts.append(markdown_table(['status', 'body', 'meaning'], answers))
    return '\n\n'.join(p for p in parts if p)

def http_api() -> str:
    "Every address of the service and every object that travels"
    from amulet_hybrid.serve.app import create_app
    spec = create_app(None).openapi()
    parts = [operation(method, path, op) for path,methods in spec['paths'].items() for method,op in methods.items()]
    objects = [f'### {name} {{#{name.lower()}}}\n\n{s.get("description", "")}\n\n{fields_of(s)}'
               for name,s in spec['components']['schemas'].items()]
    return '\n\n'.join([*parts, '## Objects', *objects])

def service_settings() -> str:
    "Every setting of `amulet serve`"
    from amulet_hybrid.serve.settings import PREFIX, Settings
    rows = []
    for name,field in Settings.model_fields.items():
        kind = re.sub(r'typing\.|pathlib\.|annotated_types\.', '',
                      str(field.annotation).removeprefix("<class '").removesuffix("'>"))
        default = '' if field.is_required() else f'`{field.get_default(call_default_factory=True)}`'
        rows.append([f'`{name}`', f'`--{name.replace("_", "-")}`', f'`{PREFIX}{name.upper()}`', f'`{kind}`', default,
                     field.description or ''])
    return markdown_table(['setting', 'option', 'variable', 'type', 'default', 'meaning'], rows)

def configs() -> dict[str,type]: # Dotted name -> class
    "Every config of the package"
    import importlib
    import pkgutil

    import amulet_hybrid
    from amulet_hybrid.core import Config
    found = {}
    for info in pkgutil.walk_packages(amulet_hybrid.__path__, 'amulet_hybrid.'):
        if 'migrations' in info.name or '_modidx' in info.name: continue
        module = importlib.import_module(info.name)
        for name,value in vars(module).items():
            if isinstance(value, type) and issubclass(value,
                                                      Config) and value is not Config and value.__module__==info.name:
                found[f'{info.name.removeprefix("amulet_hybrid.")}.{name}'] = value
    return found

def run_settings() -> str:
    "Every setting of every config: of a run, of features, of training, of an inspection"
    from renderer import cell_text, field_table, short_type, short_value
    parts = []
    for name,cls in configs().items():
        rows = [[f'`{s.name}`', f'`{short_type(s.type)}`',
                 '' if s.default.__class__.__name__=='_MISSING_TYPE' else f'`{short_value(s.default)}`',
                 cell_text(s.help), cell_text(s.range), '' if s.owner is cls else s.owner.__name__]
                for s in cls.settings().values()]
        plain = all(not row[3] for row in rows)
        body = field_table(cls) if plain else markdown_table(['setting', 'type', 'default', 'meaning', 'range', 'of'],
                                                             rows)
        parts.append(f'## {name}\n\n{cls.__doc__}\n\n{body}')
    return '\n\n'.join(parts)

def literal(node) -> str: # '' for what is no text
    "Text of a string or f-string, with its expressions as they are written"
    if isinstance(node, ast.Constant): return str(node.value) if isinstance(node.value, str) else ''
    if isinstance(node, ast.JoinedStr):
        return ''.join(v.value if isinstance(v, ast.Constant) else '{'+ast.unparse(v.value)[:40]+'}'
                       for v in node.values)
    if isinstance(node, ast.IfExp): return ' / '.join(filter(None, (literal(node.body), literal(node.orelse))))
    return ''

def error_classes() -> dict[str,str]: # Name of the class -> its own code
    "Error classes of the package and the code of each"
    from amulet_hybrid import core
    def below(cls):
        for sub in cls.__subclasses__(): yield sub; yield from below(sub)
    return {c.__name__: c.code for c in (core.AmuletError, *below(core.AmuletError))}

def error_rows() -> list[tuple]: # (code, class, module, message, advice), each code and module once
    "Every error that the package raises, read from its source"
    configs() # imports every module, and so every class of errors
    classes,rows = error_classes(),{}
    for path in sorted(PACKAGE.rglob('*.py')):
        if 'migrations' in path.parts or path.name=='_modidx.py': continue
        module = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Call): continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, 'attr', '')
            given = {k.arg: k.value for k in node.keywords}
            coded = literal(given['code']) if 'code' in given else ''
            if name not in classes and not (coded and name!='setting'): continue
            for code in (coded or classes.get(name, '')).split(' / '):
                message = literal(node.args[0]) if node.args else ''
                if code:
                    rows.setdefault((code, module), (code, name if name in classes else '', module, message,
                                                     literal(given.get('advice'))))
    return sorted(rows.values())

def error_codes() -> str:
    "Every code, who raises it, what it says, what it advises"
    rows = [[f'`{code}`', f'`{cls}`' if cls else '', f'`{module}`', message, advice]
            for code,cls,module,message,advice in error_rows()]
    words = ('Every error that we raise on purpose has a code for programs, a message for people and, where there is '
             'one, a way out. In Python it is `error.code`, over HTTP '
             '`error_code`, on the command line it stands in brackets. Names in braces are filled in.')
    return words+'\n\n'+markdown_table(['code', 'class', 'raised in', 'message', 'advice'], rows)

def run_files() -> str:
    "Every file that a run writes"
    from amulet_hybrid.jobs.train import RUN_FILES
    from amulet_hybrid.model.bundle_files import BUNDLE_FILES
    return '\n\n'.join(['## In the output folder',
                        markdown_table(['file', 'what it is'], [[f'`{k}`', v] for k,v in RUN_FILES.items()]),
                        '## In the bundle',
                        markdown_table(['file', 'what it is'], [[f'`{k}`', v] for k,v in BUNDLE_FILES.items()])])

def truth() -> str:
    "Simulations in which the truth is known: what a report promises, and how often it holds"
    with (ROOT/'benchmarks'/'results'/'truth.csv').open(encoding='utf-8', newline='') as file:
        found = list(csv.DictReader(file))
    words = ('A sentence in a report is a claim. Each was tried on made-up tests whose truth is known: '
             '`python benchmarks/truth.py` (minutes on two cores) makes this table, `--scale 4` with four times the '
             'repeats. "Before" is what an earlier version did, where it was measured.')
    header = ['case', 'figure', 'promised', 'before', 'measured', 'repeats']
    parts = [f'## {topic.replace("_", " ").capitalize()}\n\n'
             + markdown_table(header, [[row[k] for k in header] for row in found if row['topic']==topic])
             for topic in dict.fromkeys(row['topic'] for row in found)]
    return '\n\n'.join([words, *parts])

REFERENCE = {'command_line': ('Command line', command_line), 'http_api': ('HTTP API', http_api),
             'service_settings': ('Settings of the service', service_settings),
             'run_settings': ('Settings of a run', run_settings), 'error_codes': ('Error codes', error_codes),
             'run_files': ('Files of a run', run_files), 'truth': ('What the figures are worth', truth)}

def write_reference(proc):
    "All reference pages"
    folder = Path(proc)/'reference'
    folder.mkdir(exist_ok=True)
    for name,(title,make) in REFERENCE.items():
        (folder/f'{name}.qmd').write_text(page(title, make.__doc__, make()), encoding='utf-8')

# ---------------------------------------------------------------- README

def write_readme(folder):
    "README.md from the home page: links to pages and pictures lead into nbs/"
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config as Options
    nb = nbformat.read(ROOT/'nbs'/'index.ipynb', 4)
    nb.metadata['language_info'] = {'name': 'python'}
    for cell in nb.cells:
        directives = re.findall(r'^#\|[ ]*(\w+(?:: *\w+)?)', cell.source, re.M) if cell.cell_type=='code' else []
        tags = [{'hide': 'remove-cell', 'echo: false': 'remove-input'}[d]
                for d in directives if d in ('hide', 'echo: false')]
        cell.metadata['tags'] = [*cell.metadata.get('tags', []), *tags]
        if cell.cell_type=='code': cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    remove = {'enabled': True, 'remove_cell_tags': ['remove-cell'], 'remove_input_tags': ['remove-input']}
    text,_ = MarkdownExporter(config=Options({'TagRemovePreprocessor': remove})).from_notebook_node(nb)
    text = re.sub(r'\]\((images|guides|tutorials)/', r'](nbs/\1/', text)
    (Path(folder)/'README.md').write_text(re.sub(r'\n{3,}', '\n\n', text).strip()+'\n', encoding='utf-8')

# ---------------------------------------------------------------- table of modules

def module_rows() -> list[tuple[str,str,str]]: # Notebook, module, what it does
    "Every notebook that exports a module, with the line under its title"
    rows = []
    for path in sorted((ROOT/'nbs').rglob('[0-9]*.ipynb'), key=lambda p: p.relative_to(ROOT/'nbs').parts):
        if any(part.startswith('.') for part in path.parts[len(ROOT.parts):]): continue
        first,second = (''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'][:2])
        about = re.search(r'^> (.+)$', first, re.M)
        module = re.search(r'default_exp (\S+)', second)
        if not about or not module:
            raise SystemExit(f'{path.name} begins without a line that says what it does, or exports nothing')
        rows.append((path.relative_to(ROOT/'nbs').with_suffix('').as_posix(), module[1], about[1].strip()))
    return rows

def write_modules(folder):
    "CONTRIBUTING.md with the table of modules renewed"
    text = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    table = markdown_table(['notebook', 'module', 'what it does'],
                           [(f'`{n}`', f'`{m}`', about) for n,m,about in module_rows()])
    head,_,rest = text.partition('<!-- modules -->\n')
    _,_,tail = rest.partition('<!-- /modules -->')
    (Path(folder)/'CONTRIBUTING.md').write_text(f'{head}<!-- modules -->\n{table}\n<!-- /modules -->{tail}',
                                                encoding='utf-8')

# ---------------------------------------------------------------- rendered pages

_AWAY = re.compile(r'''<(?:script|link)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^>]*>(?:\s*</script>)?''', re.I)
_KEPT = re.compile(r'rel=["\'](?:canonical|alternate|edit)["\']', re.I)
_IMPORT = re.compile(r'''@import\s+(?:url\()?["']?https?://[^;]+;''')

def tidy(site):
    "Take out what a page would fetch from elsewhere"
    for path in Path(site).rglob('*.html'):
        text = path.read_text(encoding='utf-8')
        kept = _AWAY.sub(lambda m: m[0] if _KEPT.search(m[0]) else '', text)
        if kept!=text: path.write_text(kept, encoding='utf-8')
    for path in Path(site).rglob('*.css'):
        text = path.read_text(encoding='utf-8')
        if (kept := _IMPORT.sub('', text))!=text: path.write_text(kept, encoding='utf-8')
    if left := [p.relative_to(site).as_posix()
                for p in Path(site).rglob('*.html') if fetched(p.read_text(encoding='utf-8'))]:
        raise SystemExit(f'these pages still fetch from elsewhere: {", ".join(left[:10])}')

def fetched(text) -> list[str]:
    "Tags of a page that fetch from elsewhere"
    tags = re.findall(r'''<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^>]*>''', text,
                      re.I)
    return [t for t in tags if not _KEPT.search(t)]

COMMANDS = {'sidebar': write_sidebar, 'reference': write_reference, 'readme': write_readme, 'modules': write_modules,
            'tidy': tidy}

if __name__=='__main__':
    if len(sys.argv)!=3 or sys.argv[1] not in COMMANDS: raise SystemExit(__doc__)
    COMMANDS[sys.argv[1]](sys.argv[2])

"nbdev's `renderer` for `show_doc`: signature, parameters, public methods and dataclass fields with their comments"
import dataclasses
import inspect
import textwrap
from functools import cached_property
from typing import Any

import numpy.typing as npt
from fastcore.docments import docments
from nbdev.doclinks import NbdevLookup

EMPTY = inspect.Parameter.empty
ALIASES = {'ArrayLike': npt.ArrayLike, 'DTypeLike': npt.DTypeLike} # Shown by name, not by what they stand for

def short_type(annotation) -> str: # '' if there is none
    "An annotation as it was written"
    if annotation is EMPTY or annotation is None: return ''
    if hasattr(annotation, '__metadata__'): annotation = annotation.__origin__ # the rest is for the command line
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    for name,alias in ALIASES.items(): text = text.replace(inspect.formatannotation(alias), name)
    return text.replace('amulet_hybrid.', '').replace('collections.abc.', '').replace('typing.',
            '').replace('__main__.', '').replace('pathlib.', '')

def short_value(value) -> str: # At most 60 characters
    "A default value as it was written"
    if inspect.isclass(value) or inspect.isfunction(value): return value.__name__
    return textwrap.shorten(repr(value), 60, placeholder='…')

def cell_text(text) -> str: # One line
    "Text as it may stand in a table of markdown"
    return ' '.join(str(text or '').split()).replace('|', '\\|')

def code_cell(text) -> str: # '' without text
    "Text as code in a table of markdown"
    return f'`{cell_text(text)}`' if text else ''

def parameters(obj) -> list[inspect.Parameter]:
    "Parameters of a callable, less `self` and `cls`"
    try: found = inspect.signature(obj).parameters.values()
    except (ValueError, TypeError): return []
    return [p for p in found if p.name not in ('self', 'cls')]

def signature_block(name, obj, prefix='') -> str: # A fenced block of code
    "Signature on one line, or one parameter a line where it is long"
    marks = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    parts,named = [],False
    for p in parameters(obj):
        if p.kind is p.KEYWORD_ONLY and not named and not any(x.startswith('*') for x in parts): parts.append('*')
        named |= p.kind is p.KEYWORD_ONLY
        text = marks.get(p.kind, '')+p.name
        if kind := short_type(p.annotation): text += f': {kind}'
        if p.default is not EMPTY:
            text += f' = {short_value(p.default)}' if short_type(p.annotation) else f'={short_value(p.default)}'
        parts.append(text)
    returns = short_type(getattr(inspect.signature(obj), 'return_annotation',
                                 EMPTY)) if not inspect.isclass(obj) else ''
    tail = f') -> {returns}' if returns else ')'
    line = f'{prefix}{name}({", ".join(parts)}{tail}'
    if len(line) > 88: line = '\n'.join([f'{prefix}{name}(', *(f'    {p},' for p in parts), tail])
    return f'```python\n{line}\n```'

def table(header, rows) -> str: # '' without rows
    "A table of markdown"
    if not rows: return ''
    lines = [header, ['---']*len(header), *rows]
    return '\n'.join('| '+' | '.join(map(str, line))+' |' for line in lines)

def option_help(annotation) -> str: # '' if there is none
    "Help of an option of the command line, which stands in its annotation"
    return next((m.help for m in getattr(annotation, '__metadata__', ()) if getattr(m, 'help', None)), '')

def parameter_table(obj) -> str:
    "What each parameter means, and what comes back"
    try: comments = docments(obj, full=True, args_kwargs=True)
    except Exception: comments = {}
    rows = []
    for p in parameters(obj):
        kind,default = short_type(p.annotation),'' if p.default is EMPTY else f'`{short_value(p.default)}`'
        words = (comments.get(p.name) or {}).get('docment') or option_help(p.annotation)
        rows.append([f'<code>{p.name}</code>', code_cell(kind), cell_text(default), cell_text(words)])
    back = comments.get('return') or {}
    returns = short_type(back.get('anno', EMPTY))
    if not inspect.isclass(obj) and returns not in ('', 'None') or back.get('docment'):
        rows.append(['**returns**', code_cell(returns), '', cell_text(back.get('docment'))])
    return table(['', 'type', 'default', 'meaning'], rows)

def field_comment(field, comments) -> str:
    "Help of a setting, with its range; else the comment behind a field"
    about = dict(field.metadata)
    if 'help' not in about: return cell_text((comments.get(field.name) or {}).get('docment'))
    words = {'at least': about['ge'], 'above': about['gt'], 'at most': about['le'], 'below': about['lt']}
    limits = ' and '.join(f'{word} {limit:g}' for word,limit in words.items() if limit is not None)
    choices = about['choices']
    if callable(choices):
        try: choices = choices()
        except NameError: choices = () # a name that a later cell of the notebook defines
    if choices: limits = 'one of '+', '.join(f'`{c}`' for c in choices if c)
    return cell_text(f'{about["help"]} ({limits})' if limits else about['help'])

def field_default(field) -> str:
    "Default of a dataclass field, as code"
    if field.default is not dataclasses.MISSING: return f'`{short_value(field.default)}`'
    if field.default_factory is not dataclasses.MISSING: return f'`{short_value(field.default_factory())}`'
    return ''

def field_table(cls) -> str:
    "Every field of a dataclass, its type, default and meaning"
    comments:dict[str,Any] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        try: comments |= {k: v for k,v in docments(base, full=True).items() if v and v.get('docment')}
        except Exception: continue
    rows = [[f'<code>{f.name}</code>', code_cell(short_type(f.type)), cell_text(field_default(f)),
             field_comment(f, comments)]
            for f in dataclasses.fields(cls) if not f.name.startswith('_')]
    return table(['field', 'type', 'default', 'meaning'], rows)

def is_ours(cls) -> bool:
    "Whether a class is written in this package, or in the notebook that is being documented"
    return cls.__module__.split('.')[0] in ('amulet_hybrid', '__main__', 'builtins') and cls is not object

def public_methods(cls) -> dict[str,Any]: # Name -> function, property or class method, as it is in its class
    "Public methods of a class, also of its private bases, which have no page of their own"
    out:dict[str,Any] = {}
    for base in cls.__mro__:
        if base is not cls and not (is_ours(base) and base.__name__.startswith('_')): continue
        if base.__module__=='builtins' and base is not cls: continue
        for name,value in vars(base).items():
            kinds = (staticmethod, classmethod, property)
            if not name.startswith('_') and name not in out and (inspect.isfunction(value) or isinstance(value, kinds)
                                                                 or hasattr(value, 'func')):
                out[name] = value
    return out

def method_section(cls, name, value, level) -> str:
    "Heading, signature, sentence and parameters of one method"
    title = f'{"#"*level} {cls.__name__}.{name}'
    if isinstance(value, property) or hasattr(value, 'func') and not inspect.isfunction(value):
        function = value.fget if isinstance(value, property) else value.func
        returns = short_type(inspect.signature(function).return_annotation) if function else ''
        block = f'```python\n{cls.__name__}.{name}{": "+returns if returns else ""}\n```'
        return '\n\n'.join([title, block, inspect.getdoc(function) or ''])
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    prefix = '@classmethod\n' if isinstance(value, classmethod) else '@staticmethod\n' if isinstance(value,
            staticmethod) else ''
    block = signature_block(f'{cls.__name__}.{name}', function)
    if prefix: block = block.replace('```python\n', '```python\n'+prefix, 1)
    return '\n\n'.join(part for part in [title, block, inspect.getdoc(function) or '', parameter_table(function)]
                       if part)

class Renderer:
    "What `show_doc` shows of a function, or of a class with all that is public in it"
    def __init__(self, sym, name:str|None=None, title_level:int=3):
        self.sym = sym
        self.name = name or getattr(sym, '__qualname__', None) or str(sym)
        self.level = title_level

    def _repr_markdown_(self): return self.text

    @cached_property
    def text(self) -> str: # Asked for as markdown and as plain text
        "All of it"
        sym,parts = self.sym,['---']
        source = NbdevLookup().code(self.name)
        if source: parts.append(f'[source]({source}){{target="_blank" style="float:right; font-size:smaller"}}')
        parts.append(f'{"#"*self.level} {self.name}')
        if not callable(sym): return '\n\n'.join([*parts, inspect.getdoc(sym) or ''])
        parts += [signature_block(self.name, sym, 'class ' if inspect.isclass(sym) else ''), inspect.getdoc(sym) or '']
        if not inspect.isclass(sym): parts.append(parameter_table(sym))
        else:
            plain = '__init__' in vars(sym) or any('__init__' in vars(b) for b in sym.__mro__[1:] if is_ours(b)
                                                   and not dataclasses.is_dataclass(b))
            parts.append(field_table(sym) if dataclasses.is_dataclass(sym) else parameter_table(sym.__init__) if plain
                         else '')
            parts += [method_section(sym, n, m, self.level+1) for n,m in public_methods(sym).items()]
        return '\n\n'.join(part for part in parts if part)

    __repr__ = _repr_markdown_

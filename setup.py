"Packaging: everything is read from settings.ini, the one place where it is written."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

known = ('cnn', 'surf', 'heif', 'ray', 'timm', 'search', 'sql', 'store', 'postgres', 'tracking', 'sign', 'redis', 'convert',
         'serve', 'notebooks', 'dev')
extras = {name: cfg[f'{name}_requirements'].split() for name in known}
everyday = ('cnn', 'surf', 'search', 'sign', 'redis', 'store', 'postgres', 'serve', 'notebooks')
extras['all'] = sorted({r for name in everyday for r in extras[name]})

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='MIT', license_files=['LICENSE', 'LICENSES/*'], url=cfg['git_url'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['amulet_hybrid*']),
    # Pages, styles, scripts and templates lie beside the module that fills them
    package_data={'amulet_hybrid': ['py.typed', 'runs/*.ipynb'], '': ['templates/*', 'web/*']},
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d']},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Natural Language :: English',
                 *[f'Programming Language :: Python :: 3.{minor}' for minor in (11, 12, 13)]],
    zip_safe=False,
)

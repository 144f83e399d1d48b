"A setting is written once: a new field of a config appears on the command line, in the JSON and in the notebook"
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amulet_hybrid.cli.app import app
from amulet_hybrid.cli.options import Hint, config_command, late_command, new_app, parameters_cell
from amulet_hybrid.core import ConfigError, setting
from amulet_hybrid.deploy.settings import DeploySettings
from amulet_hybrid.jobs.config import RunConfig
from amulet_hybrid.jobs.evaluate import EvaluateConfig
from amulet_hybrid.jobs.finetune import FinetuneRunConfig
from amulet_hybrid.jobs.table import TABLE_MODELS, TableConfig
from amulet_hybrid.jobs.train import TrainingRun
from amulet_hybrid.learn.config import TrainingConfig

RUNS = Path(__file__).resolve().parent.parent/'nbs'/'runs'

@dataclass(frozen=True)
class PatientTraining(TrainingConfig):
    "A trainer with one setting more"
    patience:int = setting(3, 'Rounds without a gain before it stops', ge=1, le=50)

@dataclass(frozen=True)
class PatientRun(RunConfig):
    "A run with that trainer"
    training:PatientTraining = PatientTraining()

def command(*words):
    "What a command made from `PatientRun` is called with, and what it prints"
    seen,patient = [],new_app()
    @late_command(patient, 'train')
    def train():
        "Train patiently"
        return config_command(lambda settings: seen.append(PatientRun.from_dict(settings)), PatientRun,
                              hints={'data_dir': Hint(exists=True)})
    @patient.command()
    def other(): "A group has more than one command"
    return CliRunner().invoke(patient, ['train', *map(str, words)], terminal_width=200),seen

def test_new_field_is_an_option():
    page,_ = command('--help')
    line = next(line for line in page.output.splitlines() if '--patience' in line)
    for words in ('Rounds without a gain', 'at least 1 and at most 50', 'default: 3'): assert words in line

def test_new_option_arrives(tmp_path):
    done,seen = command('--data-dir', tmp_path, '--patience', 7, '--blocks', 'hog+lbp', '--no-novelty')
    assert done.exit_code==0, done.output
    config = seen[0]
    assert (config.training.patience, config.features.blocks, config.training.novelty)==(7, ('hog', 'lbp'), False)

def test_new_field_is_in_the_json(tmp_path):
    config = PatientRun(data_dir='photos').replace(patience=9)
    assert config.to_dict()['patience']==9
    config.save(tmp_path/'config.json')
    assert json.loads((tmp_path/'config.json').read_text())['patience']==9
    assert PatientRun.load(tmp_path/'config.json')==config
    assert TrainingRun(PatientRun(data_dir='photos'), patience=4).config.training.patience==4

def test_new_field_is_a_parameter_of_the_notebook():
    cell = parameters_cell(PatientRun)
    assert 'patience = 3' in cell and 'Rounds without a gain' in cell
    values:dict = {}
    exec(cell, values)
    given = {name: values[name] for name in PatientRun.settings()}
    assert PatientRun.from_dict({**given, 'data_dir': 'photos'})==PatientRun(data_dir='photos')

def test_out_of_range_is_a_wrong_call(tmp_path):
    done,seen = command('--data-dir', tmp_path, '--patience', 0)
    assert done.exit_code==2 and not seen and '`patience` must be at least 1' in done.output

@pytest.mark.parametrize('notebook,config', [('train.ipynb', RunConfig), ('evaluate.ipynb', EvaluateConfig),
                                             ('finetune.ipynb', FinetuneRunConfig)])
def test_cells_of_the_notebooks_are_generated(notebook, config):
    "To renew one: print(parameters_cell(RunConfig, defaults={'output_dir': ''}, without=['track']))"
    cells = json.loads((RUNS/notebook).read_text(encoding='utf-8'))['cells']
    found = [''.join(c['source']) for c in cells if 'parameters' in c['metadata'].get('tags', [])]
    assert found==[parameters_cell(config, defaults={'output_dir': ''}, without=['track'])]

COMMANDS = {'train': RunConfig, 'run': RunConfig, 'evaluate': EvaluateConfig, 'deploy': DeploySettings,
            'finetune': FinetuneRunConfig}

@pytest.mark.parametrize('name', COMMANDS)
def test_every_setting_has_an_option(name):
    page = CliRunner().invoke(app, [name, '--help'], terminal_width=200).output
    missing = [s.name for s in COMMANDS[name].settings().values()
               if f'--{s.flag or s.name.replace("_", "-")} ' not in page.replace(',', ' ')]
    assert not missing
    assert not [s.name for s in COMMANDS[name].settings().values() if not s.help]

def test_parts_repeat_nothing():
    for config in (RunConfig, TableConfig):
        own = set(config.__dataclass_fields__)
        assert not own & set(TrainingConfig.settings()), config

def test_config_of_an_earlier_run_loads():
    "Flat, before settings had parts, with a name for the preprocessing"
    old = {'data_dir': 'photos', 'output_dir': 'runs/x', 'groups': '', 'group_by': '', 'blocks': ['hog'],
           'preset': 'balanced', 'weights': 'none', 'test_size': .2, 'cv_folds': 5, 'quick': True, 'search': '',
           'trials': 40, 'time_budget': 2., 'coverage': .9, 'mirror': 'auto', 'preprocessing': 'artifact', 'track': '',
           'min_groups': 0, 'cache_dir': '', 'jobs': 0, 'seed': 7}
    config = RunConfig.from_dict(old)
    assert config.features.blocks==('hog',) and config.training.seed==7 and config.training.time_budget_minutes==2
    assert isinstance(config.features.preprocessing, dict)
    with pytest.raises(ConfigError, match='no setting .tests.'): RunConfig.from_dict(old | {'tests': 1})
    table = TableConfig.from_dict({'data_dir': 'wine.csv', 'target': 'kind', 'models': list(TABLE_MODELS), 'seed': 3})
    assert table.training.models==TABLE_MODELS and table.training.seed==3

def test_kinds_of_input_are_not_mixed(tmp_path):
    def call(*words): return CliRunner().invoke(app, ['train', *map(str, words)])
    (tmp_path/'wine.csv').write_text('a,kind\n1,x\n')
    for words in ((), ('--data-dir', tmp_path, '--table', 'wine.csv'), ('--data-dir', tmp_path, '--target', 'kind'),
                  ('--table', tmp_path/'wine.csv', '--target', 'kind', '--preset', 'fast'),
                  ('--data-dir', tmp_path/'none'), ('--data-dir', tmp_path, '--search', 'luck')):
        assert call(*words).exit_code==2, words

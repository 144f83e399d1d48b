"""Deployments: every rendered file is judged by the tool that will read it, nothing starts without its secrets, the
image is built by hand and run"""
import http.client
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from amulet_hybrid.core import AmuletError
from amulet_hybrid.deploy.rendering import (
    KINDS,
    SECRETS,
    SIDE_SECRETS,
    Shipment,
    deploy,
    kinds_of,
    render_deployment,
    service_environment,
    write_deployment,
)
from amulet_hybrid.deploy.settings import DeploySettings
from amulet_hybrid.features.packaged_weights import PACKAGED_NETS, requirement

KEYS = f'test:{"0"*64}'
VARIANTS = {'plain': DeploySettings(), 'one': DeploySettings(name='a', replicas=1, cpus=.5, timeout_seconds=5),
            'public': DeploySettings(name='amulets-2', host='::', port=443, replicas=20, most_replicas=40,
                                     domain='amulets.example.org', tls_dir='/etc/tls', redirect_port=80,
                                     image='registry.example.org:5000/team/amulets')}
each_variant = pytest.mark.parametrize('settings', VARIANTS.values(), ids=VARIANTS)

def tool(name, package):
    "Path of a program, or a skip that says how to get it"
    path = shutil.which(name) or shutil.which(name, path='/usr/sbin:/sbin')
    return path or pytest.skip(f'no {name} here: apt-get install {package}')

def call(*command, **more):
    "What a program says, if it is content"
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, **more)
    assert done.returncode==0, done.stdout[-3000:]+done.stderr[-3000:]
    return done.stdout+done.stderr

def written(settings, folder, **more):
    write_deployment(render_deployment(settings, ship=Shipment('0123456789ab', 'numpy==2.4.6\n', **more)), folder)
    return folder

def yaml(text): return list(pytest.importorskip('yaml').safe_load_all(text))

# What is in the files

@each_variant
def test_image_that_trains_has_the_nets(settings):
    "Pretrained nets come as packages and are verified in the build; it runs without root and without a network"
    files = render_deployment(settings, 'docker', Shipment(wheel='amulet_hybrid-0.1.0-py3-none-any.whl'))
    steps = [line for line in files['docker/train.Dockerfile'].splitlines() if line and line[0]!='#']
    assert [line for line in steps if line.startswith('FROM')]==[f'FROM {settings.base_image}']
    verify,user = (next(i for i,line in enumerate(steps) if line.startswith(word)) for word in ('RUN amulet', 'USER'))
    assert steps[verify]=='RUN amulet weights efficientnet_lite0 efficientnet_lite2 --verify' and verify < user
    assert steps[user]==f'USER {settings.uid}:{settings.uid}' and steps[-2]=='ENTRYPOINT ["amulet", "train"]'
    copied = [line.split()[1] for line in steps if line.startswith('COPY')]
    ignored = files['docker/.dockerignore'].splitlines()
    assert copied[:2]==['requirements_training.txt', 'requirements_amulet.txt'] and copied[2].startswith('wheels/')
    assert all('!'+name.partition('/')[0] in ignored for name in copied)
    wanted = files['docker/requirements_training.txt'].splitlines()
    assert {requirement(net) for net in PACKAGED_NETS} <= set(wanted)
    assert any(re.match(r'torch(==|>=)\d', line) for line in wanted)
    assert '--network none' in files['README.md']
    assert 'docker/train.Dockerfile' not in render_deployment(settings, 'render')

@each_variant
def test_no_secret_no_latest_no_root(settings):
    files = render_deployment(settings, ship=Shipment('0123456789ab', 'numpy==2.4.6\n'))
    for path,text in files.items():
        assert ':latest' not in text and 'None' not in text, path
        for line in text.splitlines():
            name,sign,value = line.strip().removeprefix('- ').partition('=' if path.endswith('.env.example') else ':')
            if sign and name in {*SECRETS, *(n for names in SIDE_SECRETS.values() for n in names)}:
                value = value.strip()
                assert value in ('', '""') or '$' in value or '%s' in value or value.startswith('{'), (path, line)
    assert f'USER {settings.uid}:{settings.uid}' in files['docker/Dockerfile']

def test_one_number_everywhere():
    "What the proxy waits for and lets in fits what the service does"
    s = DeploySettings(timeout_seconds=17, max_batch_mb=90, memory_mb=2048, grace_seconds=12)
    files = render_deployment(s)
    assert all('proxy_read_timeout 22s' in files[f'{place}/amulet.conf']
               and 'client_max_body_size 121m' in files[f'{place}/amulet.conf'] for place in ('nginx', 'docker/nginx'))
    assert ('AMULET_TIMEOUT_SECONDS=17' in files['systemd/amulet@.service']
            and 'TimeoutStopSec=17' in files['systemd/amulet@.service'])
    compose = yaml(files['docker/compose.yaml'])[0]
    pod = yaml(files['kubernetes/deployment.yaml'])[0]['spec']['template']['spec']
    assert (compose['services']['replica1']['environment']['AMULET_TIMEOUT_SECONDS']=='17'
            and compose['services']['replica3']['mem_limit']=='2048m')
    assert pod['containers'][0]['resources']['limits']['memory']=='2048Mi' and pod['terminationGracePeriodSeconds']==27

def test_only_the_proxy_is_published():
    "And to this machine alone, unless an address is given; nobody has more than the work needs"
    services = yaml(render_deployment(DeploySettings())['docker/compose.yaml'])[0]['services']
    assert {name: s['ports'] for name,s in services.items() if 'ports' in s}=={'nginx': ['127.0.0.1:8080:8080'],
            'grafana': ['127.0.0.1:3000:3000']}
    assert all(s.get('read_only') or name in ('postgres', 'grafana') for name,s in services.items())
    assert len({s['networks']['front']['ipv4_address'] for s in services.values() if 'front' in s['networks']})==4
    assert all(s['cap_drop']==['ALL'] and s['security_opt']==['no-new-privileges:true'] for s in services.values())

def test_every_container_has_limits_and_its_own_secrets():
    "Of memory, without swap, and of processes; none knows what another one knows, and the proxy reaches no database"
    compose = yaml(render_deployment(DeploySettings())['docker/compose.yaml'])[0]
    services = compose['services']
    for name,s in services.items():
        assert s['mem_limit']==s['memswap_limit'] and 0 < s['pids_limit'] <= 512 and s['cpus'] > 0, name
    files = {name: s.get('env_file', []) for name,s in services.items()}
    assert {name: f for name,f in files.items() if not name.startswith('replica')}=={
        'nginx': [], 'postgres': ['env/postgres.env'], 'redis': ['env/redis.env'], 'prometheus': [],
        'grafana': ['env/grafana.env'], 'node': []} and files['replica1']==['env/service.env']
    neighbours = {n: {name for name,s in services.items() if n in s['networks']} for n in compose['networks']}
    replicas = {'replica1', 'replica2', 'replica3'}
    assert neighbours=={'front': {'nginx', *replicas}, 'data': {'postgres', 'redis', *replicas},
                        'watch': {'prometheus', 'grafana', 'node', *replicas}, 'outside': {'nginx', 'grafana'}}
    address = services['nginx']['networks']['front']['ipv4_address']
    assert services['replica1']['environment']['AMULET_TRUSTED_PROXIES']==address
    # the way out is closed: by Docker, or for want of a way back
    assert all(n.get('internal') for name,n in compose['networks'].items() if name!='outside')
    assert compose['networks']['outside']['driver_opts']=={'com.docker.network.bridge.enable_ip_masquerade': 'false'}

def told_to(files, kind):
    "Environment of a replica as it is rendered, its host with it"
    if kind=='systemd':
        unit = files['systemd/amulet@.service'].splitlines()
        lines = [line.split('=', 1)[1].partition('=') for line in unit if line.startswith('Environment=')]
        return {k: v for k,_,v in lines}|{'AMULET_HOST': '127.0.0.1'}
    if kind=='docker': return yaml(files['docker/compose.yaml'])[0]['services']['replica1']['environment']
    if kind=='kubernetes': return yaml(files['kubernetes/config.yaml'])[2]['data']
    variables = yaml(files['render/render.yaml'])[0]['services'][0]['envVars']
    return {v['key']: v['value'] for v in variables if 'value' in v}

@pytest.mark.parametrize('kind', ['docker', 'systemd', 'kubernetes', 'render'])
def test_unfilled_secrets_keep_it_from_starting(kind, monkeypatch):
    "The example as it is: no replica starts, although those of systemd listen to this machine alone"
    from pydantic import ValidationError

    from amulet_hybrid.serve.settings import Settings
    for name in [n for n in os.environ if n.startswith('AMULET_')]: monkeypatch.delenv(name)
    def start(settings, **filled):
        files = render_deployment(settings, kind)
        unfilled = dict(line.split('=', 1) for line in files['.env.example'].splitlines() if line and line[0]!='#')
        assert 'AMULET_API_KEYS' in unfilled and not any(unfilled.values())
        with monkeypatch.context() as m:
            for name,value in {**unfilled, **told_to(files, kind), **filled}.items():
                if name.startswith('AMULET_'): m.setenv(name, value)
            return Settings()
    with pytest.raises(ValidationError, match='no keys are set'): start(DeploySettings())
    assert start(DeploySettings(), AMULET_API_KEYS=KEYS).trusted_proxies
    assert start(DeploySettings(no_auth=True)).no_auth
    assert start(DeploySettings(domain='a.example', no_auth=True)).allowed_hosts.split(',')[0] in ('a.example', '*')
    unit = render_deployment(DeploySettings())['systemd/amulet@.service']
    assert '\nEnvironmentFile=/etc/' in unit # without the file systemd does not start it either
    assert '\nStartLimitIntervalSec=0\n' in unit and '\nRestart=always\n' in unit # and never gives up

def test_secrets_are_made(tmp_path, monkeypatch):
    "A file a container, for the owner's eyes; what the service is told fits what the databases are told; never twice"
    from amulet_hybrid.core import bytes_digest
    from amulet_hybrid.serve.settings import Settings
    folder = written(DeploySettings(), tmp_path)/'docker'
    said = call('sh', folder/'secrets.sh')
    made = {p.name: dict(line.split('=', 1) for line in p.read_text().splitlines())
            for p in (folder/'env').glob('*.env')}
    assert sorted(made)==['grafana.env', 'postgres.env', 'redis.env', 'service.env']
    assert all((folder/'env'/name).stat().st_mode & 0o777==0o600 for name in made)
    service = made['service.env']
    assert made['postgres.env']['AMULET_PASSWORD'] in service['AMULET_DATABASE_URL']
    assert made['redis.env']['REDISCLI_AUTH'] in service['AMULET_ANSWER_CACHE']
    assert len({v for values in made.values() for v in values.values()})==sum(map(len, made.values()))
    for container,names in SIDE_SECRETS.items(): assert set(made[f'{container}.env'])==set(names)
    assert set(service)==set(SECRETS)
    first,admin = re.findall(r'amk_[0-9a-f]{48}', said)
    assert service['AMULET_API_KEYS']==f'first:{bytes_digest(first.encode())}'
    assert service['AMULET_ADMIN_KEY']==bytes_digest(admin.encode())
    for name,value in service.items(): monkeypatch.setenv(name, value)
    assert Settings(host='0.0.0.0').api_keys==service['AMULET_API_KEYS']
    again = subprocess.run(['sh', folder/'secrets.sh'], capture_output=True, text=True)
    assert again.returncode==1 and 'nothing was changed' in again.stderr

def test_the_role_of_the_service_is_no_superuser(tmp_path):
    "On a PostgreSQL: the script that the image carries out once, then everything that the service does with its tables"
    import sqlalchemy as sa
    from test_store import POSTGRES, postgres

    from amulet_hybrid.store.database import open_database
    engine,psql,name = postgres(),tool('psql', 'postgresql-client'),f'amulet{os.getpid()}'
    script = render_deployment(DeploySettings())['docker/postgres/role.sh'].replace('ROLE amulet', f'ROLE {name}')
    script = script.replace('TO amulet', f'TO {name}').replace('psql ', f'{psql} ')
    url = sa.make_url(POSTGRES)
    env = os.environ|{'PGHOST': url.host or '127.0.0.1', 'PGPORT': str(url.port or 5432), 'AMULET_PASSWORD': 'it\'s',
                      'POSTGRES_DB': name, 'POSTGRES_USER': url.username or 'postgres',
                      'PGPASSWORD': url.password or ''}
    with engine.connect() as db: db.exec_driver_sql(f'CREATE DATABASE {name}')
    try:
        call('bash', '-c', script, env=env)
        with engine.connect() as db:
            told = db.exec_driver_sql(f"SELECT rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls, "
                                      f"rolcanlogin FROM pg_roles WHERE rolname='{name}'").one()
        assert tuple(told)==(False, False, False, False, False, True)
        own = url.set(drivername='postgresql+psycopg', username=name, password='it\'s', database=name)
        database = open_database(own.render_as_string(hide_password=False))
        with database.engine.connect() as db:
            assert 'predictions' in sa.inspect(db).get_table_names()
            with pytest.raises(sa.exc.ProgrammingError): db.exec_driver_sql("COPY (SELECT 1) TO PROGRAM 'true'")
        database.engine.dispose()
    finally:
        with engine.connect() as db:
            db.exec_driver_sql(f'DROP DATABASE {name} WITH (FORCE)')
            db.exec_driver_sql(f'DROP ROLE IF EXISTS {name}')
        engine.dispose()

def test_images_by_digest(tmp_path):
    "The script asks the registry, the settings keep the answer, and then a tag alone is refused"
    deploy(DeploySettings(), tmp_path, 'docker')
    path = tmp_path/'bin'/'docker'
    path.parent.mkdir()
    path.write_text('#!/bin/sh\n[ "$1 $2 $3" = "buildx imagetools inspect" ] || exit 9\n'
                    'echo "sha256:$(printf %s "$4" | sha256sum | cut -c1-64)"\n')
    path.chmod(0o755)
    call('sh', tmp_path/'docker'/'pin_images.sh', env=os.environ|{'PATH': f'{path.parent}:{os.environ["PATH"]}'})
    settings = DeploySettings.load(tmp_path/'deploy.json')
    deploy(settings, tmp_path, 'docker')
    images = {s.get('image', '') for s in yaml((tmp_path/'docker'/'compose.yaml').read_text())[0]['services'].values()}
    assert sum('@sha256:' in i for i in images)==6==len(images)-1 # the seventh is built here
    steps = (tmp_path/'docker'/'Dockerfile').read_text().splitlines()
    bases = [line.split()[1] for line in steps if line.startswith('FROM')]
    assert len(bases)==2 and all(re.fullmatch(r'python:3[\d.]+-slim-bookworm@sha256:[0-9a-f]{64}', b) for b in bases)
    assert 'named by a tag alone' not in (tmp_path/'README.md').read_text()
    with pytest.raises(AmuletError, match='nginx:1.29'): settings.replace(nginx_image='nginx:1.29')
    path.write_text('#!/bin/sh\necho no such image\n')
    deploy(DeploySettings(), tmp_path/'other', 'docker')
    wrong = subprocess.run(['sh', tmp_path/'other'/'docker'/'pin_images.sh'], capture_output=True, text=True,
                           env=os.environ|{'PATH': f'{path.parent}:{os.environ["PATH"]}'})
    assert wrong.returncode==1 and 'tells no digest' in wrong.stderr
    assert '@' not in (tmp_path/'other'/'deploy.json').read_text()

def small_wheel(folder, name, needs='', note=''):
    "A wheel with nothing in it"
    import zipfile
    info = f'{name}-1.0.dist-info'
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder/f'{name}-1.0-py3-none-any.whl', 'w') as wheel:
        wheel.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}\n{note}')
        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr(f'{info}/RECORD', f'{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n')

def test_another_file_under_the_same_version_is_not_installed(tmp_path):
    "Nor a package that the lock file does not name"
    from amulet_hybrid.deploy.packages import lock_packages, lock_text
    wheels = tmp_path/'wheels'
    small_wheel(wheels, 'amulet_front', 'Requires-Dist: amulet-back\n')
    small_wheel(wheels, 'amulet_back')
    locked = lock_packages('amulet_front', '3.12', 'x86_64', wheels)
    def install(packages):
        (tmp_path/'lock.txt').write_text(lock_text('# lock', packages))
        return subprocess.run([sys.executable, '-m', 'pip', 'install', '--require-hashes', '--no-index', '--find-links',
                               wheels, '--target', tmp_path/'target', '--upgrade', '-r', tmp_path/'lock.txt'],
                              capture_output=True, text=True)
    assert install(locked).returncode==0
    unnamed = install([p for p in locked if p.name!='amulet_back'])
    assert unnamed.returncode and 'require-hashes' in unnamed.stderr
    small_wheel(wheels, 'amulet_back', note='and something else')
    changed = install(locked)
    assert changed.returncode and 'DO NOT MATCH' in changed.stderr

def test_a_lock_is_kept_until_what_is_asked_for_changes(trained, tmp_path, monkeypatch):
    "A second rendering asks nobody"
    import amulet_hybrid.deploy.rendering as rendering
    from amulet_hybrid.deploy.packages import LockedPackage
    asked = []
    def lock(requirements, *args, **kw):
        asked.append(requirements)
        return [LockedPackage('numpy', '1', '0'*64, 'https://index.example/numpy.whl')]
    monkeypatch.setattr(rendering, 'lock_packages', lock)
    wheel = tmp_path/'amulet_hybrid-0.1.0-py3-none-any.whl'
    wheel.write_bytes(b'')
    def write(**more): return deploy(DeploySettings(), tmp_path/'d', 'systemd', trained/'bundle', wheel, **more)
    assert '--hash=sha256:' in (write().folder/'requirements_production.txt').read_text() and len(asked)==1
    assert write().changed==[] and len(asked)==1
    write(public_key=trained/'key.pem.pub')
    assert len(asked)==2 and 'cryptography' in asked[1]
    assert [n for n in write(lock=False, force=True).notes if 'hashes' in n] and len(asked)==2

def test_settings_of_the_service_exist():
    "Nothing is told to the service that it does not know, and it accepts the values"
    settings = pytest.importorskip('amulet_hybrid.serve.settings')
    told = {k.removeprefix('AMULET_').lower(): v for k,v in service_environment(DeploySettings()).items()}
    known = settings.Settings(**told, api_keys=KEYS)
    assert (known.workers, known.timeout_seconds, known.max_bytes, known.metrics_open)==(2, 30, 50*2**20, True)

def test_edited_files_are_kept(tmp_path):
    deploy(DeploySettings(), tmp_path, 'docker')
    (tmp_path/'docker'/'compose.yaml').write_text('services: {}\n')
    (tmp_path/'nginx').mkdir()
    (tmp_path/'nginx'/'amulet.conf').write_text('# mine\n')
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(AmuletError, match=r'\[edited_files\].*docker/compose.yaml, nginx/amulet.conf'):
        deploy(DeploySettings(replicas=4), tmp_path)
    assert before=={p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    done = deploy(DeploySettings(replicas=4), tmp_path, force=True)
    assert 'docker/compose.yaml' in done.changed and 'replica4' in (tmp_path/'docker'/'compose.yaml').read_text()
    assert deploy(DeploySettings.load(tmp_path/'deploy.json'), tmp_path).changed==[]

def test_command_line(tmp_path):
    def amulet(*words):
        return subprocess.run([Path(sys.executable).parent/'amulet', 'deploy', *map(str, words)], capture_output=True,
                              text=True)
    done = amulet('--type', 'nginx', '--output-dir', tmp_path/'d', '--replicas', 2, '--domain', 'a.example')
    assert (done.returncode==0 and 'nginx/amulet.conf' in done.stdout
            and 'server_name a.example;' in (tmp_path/'d'/'nginx'/'amulet.conf').read_text())
    wrong = amulet('--type', 'heroku', '--output-dir', tmp_path/'d')
    assert wrong.returncode==1 and 'Known: docker, systemd, nginx, kubernetes, render, all' in wrong.stderr
    assert kinds_of('all')==list(KINDS)

# Each file by its own tool

@each_variant
def test_compose(settings, tmp_path):
    file = written(settings, tmp_path)/'docker'/'compose.yaml'
    home = file.parent
    # it carries the schema of the Compose specification
    vendor = Path(pytest.importorskip('check_jsonschema', reason='pip install check-jsonschema').__file__).parent
    schema = json.loads((vendor/'builtin_schemas'/'vendor'/'compose-spec.json').read_text(encoding='utf-8'))
    pytest.importorskip('jsonschema').validators.validator_for(schema)(schema).validate(yaml(file.read_text())[0])
    plugin = shutil.which('docker') and subprocess.run(['docker', 'compose', 'version'],
                                                       capture_output=True).returncode==0
    if not plugin: # the older program lacks the newest key, and knows all others
        tool('docker-compose', 'docker-compose')
        file.write_text(file.read_text().replace(f'name: {settings.name}\n', '', 1))
    command = ('docker', 'compose') if plugin else ('docker-compose',)
    missing = subprocess.run([*command, '-f', file, 'config'], capture_output=True, text=True)
    assert missing.returncode!=0 and '.env' in missing.stderr
    call('sh', home/'secrets.sh')
    told = call(*command, '-f', file, 'config')
    assert f'replica{settings.replicas}:' in told
    if settings.replicas!=3: return
    # as the programs inside see it: nothing starts without its password
    services = yaml(file.read_text())[0]['services']
    for name,variable in (('redis', 'REDISCLI_AUTH'), ('grafana', 'GF_SECURITY_ADMIN_PASSWORD'),
                          ('postgres', 'AMULET_PASSWORD')):
        shell = (services[name].get('entrypoint') or services[name]['command'])[2].replace('$$', '$')
        shell = shell.replace('/tmp/', f'{tmp_path}/')
        unset = subprocess.run(['/bin/sh', '-c', shell], capture_output=True, text=True,
                               env={'PATH': '/nowhere', variable: ''})
        assert unset.returncode and f'env/{name}.env.example' in unset.stderr, (name, unset.stderr)

@each_variant
def test_systemd(settings, tmp_path):
    program = tool('systemd-analyze', 'systemd')
    settings = settings.replace(install_dir=f'{tmp_path}/opt')
    units = written(settings, tmp_path)/'systemd'
    (tmp_path/'opt'/'venv'/'bin').mkdir(parents=True)
    (tmp_path/'opt'/'venv'/'bin'/'amulet').symlink_to('/bin/true')
    unit = units/f'{settings.name}@8001.service'
    assert call(program, 'verify', units/f'{settings.name}.target', unit)==''
    if 'offline' in call(program, '--help'):
        assert 'OK' in call(program, 'security', '--offline=true', '--threshold=15', unit)

@each_variant
def test_nginx(settings, tmp_path):
    program = tool('nginx', 'nginx-light')
    if settings.tls_dir:
        settings = settings.replace(tls_dir=str(tmp_path/'tls'))
        (tmp_path/'tls').mkdir()
        call(tool('openssl', 'openssl'), 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-subj',
             '/CN=amulets.example.org', '-days', '1', '-keyout', tmp_path/'tls'/'privkey.pem',
             '-out', tmp_path/'tls'/'fullchain.pem')
    folder = written(settings.replace(nginx_dir=str(tmp_path)), tmp_path)
    for place in ('nginx', 'docker/nginx'):
        told = call(program, '-t', '-c', folder/place/'nginx.conf', '-p', tmp_path)
        assert 'test is successful' in told and '[warn]' not in told.replace('the "user" directive', '')

def test_prometheus_and_grafana_queries(tmp_path):
    program,folder = tool('promtool', 'prometheus'),written(DeploySettings(), tmp_path)/'docker'
    assert 'SUCCESS' in call(program, 'check', 'config',
                             folder/'prometheus'/'prometheus.yml') and 'SUCCESS' in call(program, 'check', 'rules',
            folder/'prometheus'/'rules.yml')
    boards = [json.loads(p.read_text()) for p in (folder/'grafana'/'dashboards').glob('*.json')]
    queries = [t['expr'].replace('$__rate_interval', '1m') for b in boards for p in b['panels'] for t in p['targets']]
    rules = [{'record': f'query{i}', 'expr': q} for i,q in enumerate(queries)]
    (tmp_path/'queries.yml').write_text(json.dumps({'groups': [{'name': 'boards', 'rules': rules}]})) # JSON is YAML
    assert f'{len(queries)} rules found' in call(program, 'check', 'rules', tmp_path/'queries.yml')

def test_queries_ask_for_what_the_service_tells():
    "A renamed metric would leave an empty picture"
    monitoring = pytest.importorskip('amulet_hybrid.serve.telemetry')
    import re

    from amulet_hybrid.deploy.dashboards import ALERTS, BOARDS
    source = Path(monitoring.__file__).with_name('service.py').read_text()
    told = set(re.findall(r"\('(\w+)', '", source))|{'up'}
    for line in monitoring.ServiceMetrics(['/predict'], ['busy']).render().decode().splitlines():
        if line.startswith('# TYPE'): told.add(line.split()[2]); told.add(f'{line.split()[2]}_bucket')
    asked = [q for panels in BOARDS.values() for p in panels for q in p.queries.values()]+[a.expr for a in ALERTS]
    bare = [re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', '', re.sub(r'\b(by|on)\s*\([^)]*\)', '', q)) for q in asked]
    names = {n for q in bare for n in re.findall(r'\b([a-z][a-z_]*_[a-z_]+|up)\b(?!\s*\()', q)}
    assert {n for n in names if not n.startswith('node_')}-told==set()

def test_grafana_model(tmp_path):
    "Grafana's own model of a dashboard knows every key, and gives back what it was given"
    dashboard = pytest.importorskip('grafana_foundation_sdk.models.dashboard',
                                    reason="pip install 'grafana-foundation-sdk==1769699379!11.6.0'")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    def less(given, got, path=''):
        "What is in the one and not in the other"
        both = {type(given), type(got)}
        if both=={dict}:
            return [x for k,v in given.items()
                    for x in (less(v, got[k], f'{path}.{k}') if k in got else [f'{path}.{k}'])]
        if both=={list} and len(got)==len(given):
            return [x for i,v in enumerate(given) for x in less(v, got[i], f'{path}[{i}]')]
        return [] if given==got else [f'{path}: {given!r} became {got!r}']
    for path in (written(DeploySettings(), tmp_path)/'docker'/'grafana'/'dashboards').glob('*.json'):
        given = json.loads(path.read_text())
        got = json.loads(JSONEncoder().encode(dashboard.Dashboard.from_json(given)))
        assert [x for x in less(given, got) if not x.endswith(('.value: None became None', '.value'))]==[]

@each_variant
def test_kubernetes(settings, tmp_path):
    validator = pytest.importorskip('kubernetes_validate', reason='pip install kubernetes-validate')
    seen = []
    for path in sorted((written(settings, tmp_path)/'kubernetes').glob('*.yaml')):
        for part in yaml(path.read_text()):
            if part['kind']!='Kustomization': validator.validate(part, '1.34', strict=True)
            seen.append(part['kind'])
    assert sorted(seen)==['ConfigMap', 'Deployment', 'HorizontalPodAutoscaler', 'Ingress', 'Kustomization',
                          'Namespace', 'NetworkPolicy', 'PodDisruptionBudget', 'Secret',
                          'Service', 'ServiceAccount']
    service,ingress = yaml((tmp_path/'kubernetes'/'service.yaml').read_text())
    told = {k.removeprefix('nginx.ingress.kubernetes.io/'): v for k,v in ingress['metadata']['annotations'].items()}
    assert ingress['spec']['tls'][0]['secretName']==f'{settings.name}-tls' and told['force-ssl-redirect']=='true'
    assert (told['limit-connections'], told['limit-rps'])==(str(settings.connections_per_client),
            str(settings.requests_per_client))
    assert (told['proxy-request-buffering'], told['proxy-next-upstream'])==('off', 'error timeout')
    out = yaml((tmp_path/'kubernetes'/'network.yaml').read_text())[0]['spec']['egress']
    assert all(rule['to'] for rule in out)
    assert [b['ipBlock']['cidr'] for b in out[1]['to']]==settings.data_networks.split(',')
    limits = yaml((tmp_path/'kubernetes'/'deployment.yaml').read_text())[0]['spec']['template']['spec']['containers'][0]
    assert set(limits['resources']['limits'])=={'cpu', 'memory', 'ephemeral-storage'}
    with pytest.raises(validator.ValidationError): # it does look
        pod = yaml((tmp_path/'kubernetes'/'deployment.yaml').read_text())[0]
        pod['spec']['template']['spec']['containers'][0]['livenessProbes'] = {}
        validator.validate(pod, '1.34', strict=True)

@each_variant
def test_render_blueprint(settings):
    blueprint = yaml(render_deployment(settings)['render/render.yaml'])[0]
    web,cache = blueprint['services']
    assert set(web) <= {'type', 'name', 'runtime', 'plan', 'dockerfilePath', 'dockerContext', 'healthCheckPath',
                        'numInstances', 'maxShutdownDelaySeconds', 'domains', 'envVars'}
    assert (web['runtime'], web['healthCheckPath'], cache['type'], cache['ipAllowList'])==('docker', '/health/ready',
            'keyvalue', [])
    told = {v['key']: v for v in web['envVars']}
    assert told['AMULET_API_KEYS']=={'key': 'AMULET_API_KEYS', 'sync': False} and 'AMULET_METRICS_OPEN' not in told
    sources = ('value', 'sync', 'generateValue', 'fromDatabase', 'fromService')
    assert all(sum(k in v for k in sources)==1 for v in told.values())
    assert told['AMULET_DATABASE_URL']['fromDatabase']['name']==blueprint['databases'][0]['name']

# The image

def packages(image):
    return [p for p in (image.python.parent.parent/'lib').glob('python*/site-packages/*') if p.is_dir()]

def test_image_is_small(image):
    names = {p.name.lower() for p in packages(image)}
    assert not names & {'torch', 'torchvision', 'sklearn', 'pandas', 'matplotlib', 'scipy', 'pip', 'setuptools'}
    size = sum(f.stat().st_size for f in image.python.parent.parent.rglob('*') if f.is_file() and not f.is_symlink())
    print(f'installed packages: {size/1e6:.0f} MB')
    assert size < 500e6

def test_image_runs_as_nobody_who_can_write(image):
    code = '''import os, sys
def can(path):
    try: open(os.path.join(path, 'x'), 'w').close(); return True
    except OSError: return False
print(os.getuid(), [p for p in sys.argv[1:] if can(p)],
      open('/proc/self/status').read().split('CapBnd:')[1].split()[0] if os.path.exists('/proc/self/status') else '')'''
    code_places = [image.python.parent, image.at('/opt/amulet/model'), '/etc', '/usr/local/bin']
    status,said = image.run(image.python, '-c', code, *code_places, image.at('/var/lib/amulet'), '/tmp')
    assert status==0, said
    if os.geteuid()==0: assert said.split('\n')[0]==f"10001 ['{image.at('/var/lib/amulet')}', '/tmp'] 0000000000000000"

def get(port, path='/health/ready', headers=None, method='GET', body=None, timeout=30):
    "Status, headers and content"
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status,dict(answer.getheaders()),answer.read()
    finally: connection.close()

def until(true, process=None, seconds=60):
    "Wait for something"
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        try:
            if true(): return
        except OSError: pass
        assert process is None or process.poll() is None, getattr(process, 'said', '')
        time.sleep(.05)
    raise AssertionError(f'not within {seconds} s')

def form(photo):
    "Body and headers of an upload"
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return head+photo+b'\r\n--x--\r\n',{'Content-Type': 'multipart/form-data; boundary=x'}

def test_image_serves(image, trained):
    "Started by its own command, found well by its own health check, asked with a key, stopped as Docker stops it"
    import hashlib
    body,headers = form((trained/'photo.png').read_bytes())
    process = image.start(AMULET_API_KEYS=f'me:{hashlib.sha256(b"secret").hexdigest()}')
    try:
        until(lambda: get(image.port)[0]==200, process)
        assert image.run(*image.health)[0]==0
        assert get(image.port, '/predict/file', headers, 'POST', body)[0]==401
        status,_,content = get(image.port, '/predict/file', headers|{'X-API-Key': 'secret'}, 'POST', body)
        assert status==200 and json.loads(content)['model_version']
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    finally: process.kill(); process.wait()
    assert process.returncode in (0, -signal.SIGTERM, 128+signal.SIGTERM), ''.join(process.said)
    assert image.run(*image.health)[0]!=0
    # it was recorded, without pandas
    with closing(sqlite3.connect(f'file:{image.at("/var/lib/amulet")}/amulet.db?mode=ro', uri=True)) as db:
        assert db.execute('select count(*) from predictions').fetchone()==(1,)

def test_image_needs_keys(image):
    "It listens to all, as a container must; without a key it does not start"
    status,said = image.run(*image.command, AMULET_DATABASE_URL='off')
    assert status!=0 and 'api_keys' in said.lower()

def test_the_threat_table_names_tests_that_are_there():
    "Every promise of the guide has its proof"
    here = Path(__file__).parent
    text = (here.parent/'nbs'/'guides'/'operate.qmd').read_text(encoding='utf-8')
    table,_,proofs = text.partition('## What an attacker meets')[2].partition('## Promise and proof')
    rows = [line.split('|')[1:-1] for line in table.splitlines() if line.startswith('| ')][1:]
    assert len(rows) > 15 and all(len(row)==3 for row in rows)
    for threat,_,how in rows:
        files = re.findall(r'`(test_\w+\.py)`(?:: ((?:`test_\w+`(?:, )?)+))?', how)
        assert files or 'benchmarks/' in how, threat
        for file,names in files:
            source = (here/file).read_text(encoding='utf-8')
            assert not [n for n in re.findall(r'`(test_\w+)`', names) if f'\ndef {n}(' not in source], (threat, file)
    for path in set(re.findall(r'python (benchmarks/\w+\.py)|pytest (tests/\w+\.py)', table+proofs)):
        assert (here.parent/''.join(path)).is_file(), path

"""Deployments: every rendered file is judged by the tool that will read it, the image is built by hand and run, nginx
stands before three replicas of which one is killed"""
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import free_ports

from amulet_hybrid.core import AmuletError
from amulet_hybrid.deploy.rendering import (
    KINDS,
    Shipment,
    deploy,
    kinds_of,
    render_deployment,
    service_environment,
    write_deployment,
)
from amulet_hybrid.deploy.settings import DeploySettings

SECRETS = {'AMULET_API_KEYS': f'test:{"0"*64}', 'POSTGRES_PASSWORD': 'a1', 'REDIS_PASSWORD': 'b2',
           'GRAFANA_PASSWORD': 'c3'}
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
def test_no_secret_no_latest_no_root(settings):
    files = render_deployment(settings, ship=Shipment('0123456789ab', 'numpy==2.4.6\n'))
    for path,text in files.items():
        assert ':latest' not in text and 'None' not in text, path
        for line in text.splitlines():
            name,sign,value = line.strip().removeprefix('- ').partition('=' if path.endswith('.env.example') else ':')
            if sign and name in {*SECRETS, 'AMULET_ADMIN_KEY', 'AMULET_DATABASE_URL', 'AMULET_ANSWER_CACHE'}:
                assert value.strip() in ('', '""') or '${' in value or value.strip().startswith('{'), (path, line)
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
    "And to this machine alone, unless an address is given"
    services = yaml(render_deployment(DeploySettings())['docker/compose.yaml'])[0]['services']
    assert {name: s['ports'] for name,s in services.items() if 'ports' in s}=={'nginx': ['127.0.0.1:8080:8080'],
            'grafana': ['127.0.0.1:3000:3000']}
    assert all(s.get('read_only') or name in ('postgres', 'grafana') for name,s in services.items())
    assert len({s['networks']['inside']['ipv4_address']
                for name,s in services.items() if name.startswith('replica')})==3

def test_settings_of_the_service_exist():
    "Nothing is told to the service that it does not know, and it accepts the values"
    settings = pytest.importorskip('amulet_hybrid.serve.settings')
    told = {k.removeprefix('AMULET_').lower(): v for k,v in service_environment(DeploySettings()).items()}
    known = settings.Settings(**told, api_keys=SECRETS['AMULET_API_KEYS'])
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
    # it carries the schema of the Compose specification
    home = Path(pytest.importorskip('check_jsonschema', reason='pip install check-jsonschema').__file__).parent
    schema = json.loads((home/'builtin_schemas'/'vendor'/'compose-spec.json').read_text(encoding='utf-8'))
    pytest.importorskip('jsonschema').validators.validator_for(schema)(schema).validate(yaml(file.read_text())[0])
    plugin = shutil.which('docker') and subprocess.run(['docker', 'compose', 'version'],
                                                       capture_output=True).returncode==0
    if not plugin: # the older program lacks the newest key, and knows all others
        tool('docker-compose', 'docker-compose')
        file.write_text(file.read_text().replace(f'name: {settings.name}\n', '', 1))
    command = ('docker', 'compose') if plugin else ('docker-compose',)
    told = call(*command, '-f', file, 'config', env=os.environ|SECRETS)
    assert f'replica{settings.replicas}:' in told
    if settings.replicas!=3: return
    missing = subprocess.run([*command, '-f', file, 'config'], capture_output=True, text=True,
                             env={k: v for k,v in os.environ.items() if k not in SECRETS})
    assert missing.returncode!=0 and 'env.example' in missing.stderr

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
    assert all(sum(k in v for k in ('value', 'sync', 'fromDatabase', 'fromService'))==1 for v in told.values())
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

# nginx before replicas

class Stand:
    "An upstream that does as it is told, and counts"
    def __init__(self, port, status=200, dies=False):
        stand = self
        self.asked,self.open = 0,[]
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def setup(self): super().setup(); stand.open.append(self.connection)
            def do_POST(self):
                self.rfile.read(int(self.headers.get('Content-Length', 0)))
                stand.asked += 1
                if dies: self.connection.shutdown(socket.SHUT_RDWR); self.close_connection = True; return
                body = json.dumps({'port': port, 'id': self.headers.get('X-Request-ID'),
                                   'from': self.headers.get('X-Forwarded-For')}).encode()
                self.send_response(status)
                if status==503: self.send_header('Retry-After', '7')
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            do_GET = do_POST
            def log_message(self, *words): pass
        self.server = ThreadingHTTPServer(('127.0.0.1', port), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': .02}, daemon=True).start()

    def close(self):
        "Go, and break off what is open, as a process that ends does"
        self.server.shutdown()
        self.server.server_close()
        for connection in self.open:
            with suppress(OSError): connection.shutdown(socket.SHUT_RDWR)

@pytest.fixture
def nginx():
    "Starts nginx as rendered, before replicas on ports of this machine"
    program,started = tool('nginx', 'nginx-light'),[]
    def start(folder, **settings):
        first = free_ports(5)
        s = DeploySettings(port=first, grafana_port=first+1, first_port=first+2, nginx_dir=str(folder), **settings)
        folder.chmod(0o755)
        for parent in folder.parents:
            # workers are nobody
            if parent!=Path(parent.anchor) and os.access(parent, os.W_OK) and not parent.stat().st_mode & 1:
                parent.chmod(parent.stat().st_mode|0o11)
        write_deployment(render_deployment(s, 'nginx'), folder)
        started.append(subprocess.Popen([program, '-c', folder/'nginx'/'nginx.conf', '-p', folder, '-g',
                                         'daemon off;'], stderr=subprocess.PIPE, text=True))
        until(lambda: socket.create_connection(('127.0.0.1', first), 1).close() is None, started[-1], 10)
        return s
    yield start
    for process in started: process.terminate(); process.wait(20)

def test_what_nginx_repeats(nginx, tmp_path):
    "A question is asked again elsewhere, when a replica dies over it or is busy; feedback is not"
    s = nginx(tmp_path)
    dying,busy,fine = stands = [Stand(s.first_port, dies=True), Stand(s.first_port+1, 503), Stand(s.first_port+2)]
    try:
        for _ in range(20):
            status,_,body = get(s.port, '/v1/predict/file',
                                {'X-Request-ID': 'asked-once', 'X-Forwarded-For': '6.6.6.6'}, 'POST', b'photo')
            assert (status, json.loads(body))==(200, {'port': s.first_port+2, 'id': 'asked-once', 'from': '127.0.0.1'})
        assert dying.asked and busy.asked > 3 # busy is no failure: it goes on being asked
        time.sleep(2.1) # whoever died is let in again
        dying.asked = busy.asked = fine.asked = 0
        told = Counter(get(s.port, '/feedback', {}, 'POST', b'{}')[0] for _ in range(9))
        assert dying.asked+busy.asked+fine.asked==9 and set(told)=={200, 503}
    finally:
        for stand in stands: stand.close()

def test_nobody_left(nginx, tmp_path):
    "All busy: the replica's own word and its Retry-After; all gone: nginx's, in the same form"
    s = nginx(tmp_path)
    stands = [Stand(s.first_port+i, 503) for i in range(3)]
    try:
        for _ in range(10):
            status,headers,body = get(s.port, '/predict', {}, 'POST', b'{}')
            assert (status, headers['Retry-After'])==(503, '7') and 'port' in json.loads(body)
    finally:
        for stand in stands: stand.close()
    start = time.monotonic()
    status,headers,body = get(s.port, '/predict', {}, 'POST', b'{}')
    assert (status, headers['Retry-After'], json.loads(body)['error_code'])==(503, '2',
            'busy') and time.monotonic()-start < 2

def test_what_nginx_refuses(nginx, tmp_path):
    s = nginx(tmp_path, max_batch_mb=1, max_photo_mb=1)
    stands = [Stand(s.first_port+i) for i in range(3)]
    try:
        status,_,body = get(s.port, '/predict/file', {'Content-Length': str(4*2**20)}, 'POST', b'x'*100)
        assert (status, json.loads(body)['error_code'])==(413, 'image_too_large')
        for path in ('/metrics', '/v1/metrics', '/admin/reload', '/v1/admin/reload', '/metrics/', '//metrics',
                     '/x/../metrics', '/%6detrics'):
            assert get(s.port, path)[0]==404, path
        assert get(s.port, '/health/ready')[0]==200 and sum(stand.asked for stand in stands)==1
    finally:
        for stand in stands: stand.close()

class Load:
    "Callers that ask and ask, each with a connection of its own"
    def __init__(self, port, body, headers, callers=6):
        self.port = port
        self.body = body
        self.headers = headers
        self.told = Counter()
        self.failed = []
        self.going = True
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(callers)]
        for t in self.threads: t.start()

    def _ask(self):
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=30)
        while self.going:
            try:
                connection.request('POST', '/predict/file', self.body, self.headers)
                answer = connection.getresponse()
                content = answer.read()
                self.told[answer.status] += 1
                if answer.status!=200: self.failed.append((answer.status, content[:300]))
            except OSError as error:
                self.failed.append(repr(error))
                connection.close()

    def stop(self):
        self.going = False
        for t in self.threads: t.join(40)

@pytest.fixture
def replicas(trained, tmp_path):
    "Three services on ports in a row"
    started = []
    def start(first, bundle=trained/'bundle'):
        env = os.environ|{'AMULET_DATABASE_URL': 'off', 'AMULET_JOURNAL_DIR': str(tmp_path/'journal'),
                          'AMULET_WORKERS': '1', 'AMULET_ANSWER_CACHE': 'off'}
        for i in range(3):
            log = (tmp_path/f'replica{i}.log').open('w')
            started.append(subprocess.Popen([Path(sys.executable).parent/'amulet', 'serve', '--model-dir', bundle,
                                             '--port', str(first+i)], env=env, stdout=log, stderr=log))
        for i,process in enumerate(started): until(lambda i=i: get(first+i)[0]==200, process)
        return started
    yield start
    for process in started:
        if process.poll() is None: process.kill()
        process.wait()

def test_a_replica_is_killed_under_load(nginx, replicas, trained, tmp_path):
    "kill -9, in the middle of what it does: nobody notices"
    s = nginx(tmp_path)
    processes = replicas(s.first_port)
    load = Load(s.port, *form((trained/'photo.png').read_bytes()))
    try:
        until(lambda: load.told[200] > 60)
        processes[1].kill()
        processes[1].wait()
        before = load.told[200]
        until(lambda: load.told[200] > before+100)
    finally: load.stop()
    print(f'{sum(load.told.values())} requests, {len(load.failed)} failed')
    assert load.failed==[]
    log = [json.loads(line) for line in (tmp_path/'access.log').read_text().splitlines()]
    assert any(',' in line['replica'] for line in log) # some were asked twice

def test_reload_one_after_the_other_under_load(nginx, replicas, trained, tmp_path):
    "Another bundle in place of the first, and SIGHUP: no request fails, and all replicas answer with the new one"
    from amulet_hybrid.model.bundle import load_bundle
    serving = tmp_path/'serving'
    shutil.copytree(trained/'bundle', serving)
    s = nginx(tmp_path)
    processes = replicas(s.first_port, serving)
    load = Load(s.port, *form((trained/'photo.png').read_bytes()))
    try:
        until(lambda: load.told[200] > 30)
        old = load_bundle(serving).version
        again(serving)
        new = load_bundle(serving).version
        assert new!=old
        for i,process in enumerate(processes):
            process.send_signal(signal.SIGHUP)
            until(lambda i=i: json.loads(get(s.first_port+i, '/health')[2])['model_version']==new, process)
        before = load.told[200]
        until(lambda: load.told[200] > before+30)
    finally: load.stop()
    print(f'{sum(load.told.values())} requests, {len(load.failed)} failed')
    assert load.failed==[]

def again(folder):
    "The same model under another digest"
    import amulet_hybrid.model.bundle_files as bundle
    manifest = json.loads((folder/bundle.MANIFEST).read_text())
    card = (folder/'MODEL_CARD.md')
    card.write_text(card.read_text()+'\nThe second one.\n')
    manifest['files']['MODEL_CARD.md'] = bundle.file_entry(card)
    bundle.write_manifest(folder, manifest)
    (folder/bundle.SIGNATURE).unlink(missing_ok=True)

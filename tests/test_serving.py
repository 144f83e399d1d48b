"The service on a real port: what a test client inside the process cannot show"
import base64
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import chain, repeat
from pathlib import Path

import httpx
import pytest
from PIL import Image

from amulet_hybrid.data.samples import draw_logo
from amulet_hybrid.model.bundle_files import MANIFEST, write_manifest
from amulet_hybrid.model.classifier import HybridClassifier
from amulet_hybrid.serve.auth import make_key

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SERVER = '''
import os, time
from pathlib import Path
from amulet_hybrid.data.images import read_image
from amulet_hybrid.model.prediction import Prediction
from amulet_hybrid.serve.telemetry import start_logging
from amulet_hybrid.serve.app import create_app, serve

gate = Path(os.environ['GATE'])

class Gated:
    "Answers once the gate, a file, is there"
    classes,model_version = ['clay', 'gold'],'gated-1'
    def classify(self, photo, confidence_threshold=None):
        gold = float(read_image(photo).mean()/255)
        while not gate.exists(): time.sleep(.01)
        return Prediction('gold', 'gold', gold, {'clay': 1-gold, 'gold': gold})

start_logging()
serve(create_app(Gated()))
'''
SECONDS = 60 # After which what should happen is taken not to happen, however busy the machine is

def get(url, **more): return httpx.get(url, timeout=SECONDS, **more)

def post(url, **more): return httpx.post(url, timeout=SECONDS, **more)

def until(check, what='it'):
    "Wait for something to become true"
    end = time.monotonic()+SECONDS
    while not check():
        assert time.monotonic() < end, f'{what} did not happen'
        time.sleep(.02)

def photo(grey=230, side=16):
    out = io.BytesIO()
    Image.new('L', (side,side), grey).save(out, 'PNG')
    return out.getvalue()

def free_port():
    with socket.create_server(('127.0.0.1', 0)) as free: return free.getsockname()[1]

def clean(**env):
    "An environment with these settings and no others"
    kept = {k: v for k,v in os.environ.items() if not k.startswith('AMULET_')}
    return {**kept, 'PYTHONPATH': str(ROOT), 'AMULET_PROGRESS': 'off', **{k: str(v) for k,v in env.items()}}

@contextmanager
def running(command, log, **env):
    "A server and its address; its log is left in a file"
    port = free_port()
    given = clean(AMULET_PORT=port, **env)
    with open(log, 'w') as told:
        process = subprocess.Popen(command, stderr=told, stdout=subprocess.DEVNULL, env=given, cwd=log.parent)
    process.url = f'http://127.0.0.1:{port}'
    process.port = port
    process.log = log
    def is_up():
        assert process.poll() is None, log.read_text()
        with suppress(httpx.TransportError): return get(f'{process.url}/health/live').status_code==200
    try:
        until(is_up, 'the start')
        yield process
    finally:
        process.kill()
        process.wait()

@contextmanager
def gated(folder, is_open=False, **settings):
    "The stand-in, which answers when `open_gate` is called"
    gate = folder/'gate'
    with running([sys.executable, '-c', SERVER], folder/'log', GATE=gate,
                 **{f'AMULET_{k.upper()}': v for k,v in settings.items()}) as process:
        process.open_gate = gate.touch
        if is_open: gate.touch()
        yield process

@contextmanager
def real(folder, bundle, **settings):
    "`amulet serve` with a trained bundle"
    command = [BIN/'amulet', 'serve', '--model-dir', bundle, '--database-url', 'off']
    with running(command, folder/'log', **{f'AMULET_{k.upper()}': v for k,v in settings.items()}) as process:
        yield process

@pytest.fixture
def server(tmp_path):
    with gated(tmp_path, max_bytes=2**20, max_batch_bytes=2**20, timeout_seconds=2*SECONDS) as process: yield process

def ask(url):
    "A prediction under way: the thread that waits for it, and where the answer will be"
    answers = []
    def work():
        answers.append(httpx.post(f'{url}/predict/file', files={'files': photo()}, timeout=2*SECONDS))
    worker = threading.Thread(target=work)
    worker.start()
    return worker,answers

def raw(port, *pieces):
    "Statuses and the last body of what comes back for these bytes; endless pieces stop at the answer"
    with closing(socket.create_connection(('127.0.0.1', port), timeout=SECONDS)) as line:
        out = b''
        with suppress(OSError): # the other side has had enough
            for piece in pieces[0] if pieces and not isinstance(pieces[0], bytes) else pieces:
                line.sendall(piece)
                if select.select([line], [], [], .02)[0]: break
        with suppress(OSError):
            while got := line.recv(2**16): out += got
    heads = re.findall(rb'HTTP/1\.1 (\d\d\d)', out)
    return [int(h) for h in heads],out.rpartition(b'\r\n\r\n')[2]

def is_running(server): return 'predictions_running 1.0' in get(f'{server.url}/metrics').text

def test_event_loop_stays_free(server):
    "`/health` answers while a prediction is under way"
    worker,answers = ask(server.url)
    until(lambda: is_running(server))
    assert get(f'{server.url}/health').json()['predictions_count']==0
    assert not answers
    server.open_gate()
    worker.join()
    assert answers[0].json()['predicted_class']=='gold'

def test_too_large_is_told_not_cut_off(server):
    "A client that sends 60 MB at once still gets to read why it was refused, with and without a length"
    def pieces():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(60): yield b'x'*2**20
    for request in (dict(files={'files': b'x'*60*2**20}),
                    dict(content=pieces(), headers={'content-type': 'multipart/form-data; boundary=x'})):
        r = post(f'{server.url}/predict/file', **request)
        assert (r.status_code, r.json()['error_code'])==(413, 'image_too_large')

@pytest.mark.skipif(sys.platform!='linux', reason='reads /proc')
def test_refused_bodies_take_no_memory(server):
    def resident(): return int(open(f'/proc/{server.pid}/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')
    post(f'{server.url}/predict/file', files={'files': b'x'*2**21})
    before = resident()
    for _ in range(3): post(f'{server.url}/predict/file', files={'files': b'x'*60*2**20})
    assert resident()-before < 20*2**20

@pytest.mark.parametrize('stop', [signal.SIGINT, signal.SIGTERM])
def test_stops_gracefully(server, stop):
    "What has begun is finished; then the process ends"
    worker,answers = ask(server.url)
    until(lambda: is_running(server))
    server.send_signal(stop)
    def is_closed():
        try: socket.create_connection(('127.0.0.1', server.port), timeout=SECONDS).close()
        except ConnectionRefusedError: return True
        except ConnectionResetError: return False # it is about to close
    until(is_closed, 'the end of listening')
    assert not answers and server.poll() is None
    server.open_gate()
    worker.join()
    assert answers[0].json()['predicted_class']=='gold'
    assert server.wait(timeout=SECONDS)==(0 if stop==signal.SIGINT else -signal.SIGTERM)
    told = server.log.read_text()
    assert 'Application shutdown complete' in told and 'Traceback' not in told

def test_port_in_use(server, tmp_path):
    again = subprocess.run([sys.executable, '-c', SERVER], capture_output=True, text=True, timeout=SECONDS,
                           env=clean(AMULET_PORT=server.port, GATE=tmp_path/'gate'))
    assert again.returncode==1 and '[port_in_use]' in again.stderr

def test_a_full_queue_refuses_at_once(tmp_path):
    "One at work, two in the queue, the others are told to come back; in a batch every photo has its turn"
    with gated(tmp_path, workers=1, queue_size=2, queue_seconds=2*SECONDS, timeout_seconds=2*SECONDS,
               answer_cache='off') as server:
        asked = [ask(server.url) for _ in range(10)]
        until(lambda: sum(len(answers) for _,answers in asked)==7, 'seven refusals while nobody is done')
        assert get(f'{server.url}/health').json()['queue_depth']==2
        server.open_gate()
        for worker,_ in asked: worker.join()
        got = [answers[0] for _,answers in asked]
        refused = [r for r in got if r.status_code==503]
        assert sorted(r.status_code for r in got)==[200]*3+[503]*7
        assert all(r.json()['error_code']=='busy' and int(r.headers['retry-after']) >= 1 for r in refused)
        batch = post(f'{server.url}/predict-batch',
                     files=[('files', photo(g)) for g in (1, 2)]+[('files', b'no photo')]).json()
        assert (batch['answered'], batch['failed'], batch['results'][2]['error_code'])==(2, 1, 'unsupported_format')
        assert 'rejects_total{reason="busy"} 7.0' in get(f'{server.url}/metrics').text

def test_who_hangs_up_leaves_the_queue(tmp_path):
    with gated(tmp_path, workers=1, queue_seconds=2*SECONDS, timeout_seconds=2*SECONDS, answer_cache='off') as server:
        def waiting(): return get(f'{server.url}/health').json()['queue_depth']
        worker,answers = ask(server.url)
        until(lambda: is_running(server))
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'+photo()+b'\r\n--x--\r\n'
        lines = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(8)]
        head = (b'POST /predict/file HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: '
                b'%d\r\n\r\n') % len(body)
        for line in lines: line.sendall(head+body)
        until(lambda: waiting()==8)
        for line in lines: line.close()
        until(lambda: waiting()==0)
        server.open_gate()
        worker.join()
        assert answers[0].status_code==200

def test_time_is_up(tmp_path):
    with gated(tmp_path, timeout_seconds=.3) as server:
        r = post(f'{server.url}/predict/file', files={'files': photo()})
        assert (r.status_code, r.json()['error_code'])==(504, 'timed_out')

def test_slow_and_wrong_senders(tmp_path):
    "Heads and bodies that drop in, lengths that lie: an answer in bounded time, and the service goes on"
    with gated(tmp_path, is_open=True, body_seconds=2, header_seconds=2, max_bytes=10_000,
               max_batch_bytes=10_000) as server:
        head = b'POST /predict/file HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n'
        part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        too_slow = (chain([head+b'Content-Length: 5000\r\n\r\n', b'--x\r\n'], repeat(b'A')), [head[:20]],
                    chain([head], repeat(b'a: b\r\n')))
        with ThreadPoolExecutor(3) as pool:
            assert [r[0] for r in pool.map(lambda pieces: raw(server.port, iter(pieces)), too_slow)]==[[408]]*3
        assert raw(server.port, head+b'Content-Length: 100000\r\n\r\n')[0]==[413]
        assert raw(server.port, head+b'Transfer-Encoding: chunked\r\n\r\n', b'%x\r\n' % len(part)+part+b'\r\n',
                   *[b'1000\r\n'+b'x'*4096+b'\r\n']*40)[0]==[413]
        for lie in (b'Content-Length: -1', b'Content-Length: 1e3', b'Content-Length: 5\r\nContent-Length: 6',
                    b'Content-Length: 5\r\nTransfer-Encoding: chunked',
                    b'Content-Length: 99999999999999999999999'):
            status,body = raw(server.port, head+lie+b'\r\n\r\nabcde')
            assert status[0] in (400, 413) and json.loads(body)['error_code'], lie
        assert raw(server.port, b'GET / HTTP/1.1\r\n'+b'a: '+b'x'*200_000+b'\r\n')[0]==[431]
        assert raw(server.port, b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc')[0]==[400]
        short = socket.create_connection(('127.0.0.1', server.port))
        short.sendall(head+b'Content-Length: 5000\r\n\r\n--x')
        short.close()
        assert post(f'{server.url}/predict/file', files={'files': photo()}).status_code==200
        assert 'Traceback' not in server.log.read_text()

def test_60_clients(trained, tmp_path):
    "Known photos and new ones from 60 threads: all answers are those of the classifier"
    photos = []
    for seed in range(6):
        out = io.BytesIO()
        Image.fromarray(draw_logo('text', seed=900+seed, side=96)).save(out, 'PNG')
        photos.append(out.getvalue())
    here = HybridClassifier(trained/'bundle', enable_caching=False)
    want = [here.classify(p).top for p in photos]
    with real(tmp_path, trained/'bundle',
              queue_seconds=600, timeout_seconds=600) as server, httpx.Client(
                  limits=httpx.Limits(max_connections=60), timeout=600) as client:
        def one(i):
            p = i%len(photos)
            if i%3:
                r = client.post(f'{server.url}/v1/predict/file', files={'files': photos[p]},
                                headers={'x-request-id': f'request-{i:04d}'})
            else:
                r = client.post(f'{server.url}/predict', json={'image_data': base64.b64encode(photos[p]).decode()},
                                headers={'x-request-id': f'request-{i:04d}'})
            return r.status_code,r.json().get('top_class')==want[p],r.headers['x-request-id']==f'request-{i:04d}'
        with ThreadPoolExecutor(60) as pool: assert set(pool.map(one, range(300)))=={(200, True, True)}
        several = client.post(f'{server.url}/predict/file', files=[('files', p) for p in photos[:3]],
                              data={'coverage': '0.8', 'time_budget_ms': '5000'}).json()
        assert several['coverage']==.8 and several['prediction_id']
        told = client.post(f'{server.url}/feedback',
                           json={'prediction_id': several['prediction_id'], 'true_label': several['top_class']}).json()
        assert told['success'] and told['right'] in (True, None)
        info = client.get(f'{server.url}/info').json()
        assert info['classes']==here.classes and '# ' in info['card']
        health = client.get(f'{server.url}/health').json()
        assert health['predictions_count']==301 and health['memory_usage_mb'] > 30
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    asked = [line for line in lines if line['message']=='request' and line['path']=='/predict']
    assert len(asked)==100 and all(line['status']==200 and line['ms'] > 0 and line['request_id'].startswith('request-')
                                   for line in asked)
    assert max(map(len, server.log.read_text().splitlines())) < 1000 # no photo in it

def changed_bundle(source, target, note):
    "The same bundle with another digest"
    if target.exists(): shutil.rmtree(target)
    shutil.copytree(source, target)
    manifest = json.loads((target/MANIFEST).read_text())
    (target/'signature.json').unlink(missing_ok=True)
    return write_manifest(target, {**manifest, 'data': {**manifest['data'], 'note': note}})[:12]

def test_reload_loses_no_request(trained, tmp_path):
    "By signal and by address, under load; what cannot be used changes nothing"
    place = tmp_path/'current'
    versions = [changed_bundle(trained/'bundle', tmp_path/n, n) for n in 'ab']
    def point_to(name):
        (tmp_path/'next').symlink_to(tmp_path/name)
        os.replace(tmp_path/'next', place)
    point_to('a')
    admin,line = make_key('admin')
    data = (trained/'photo.png').read_bytes()
    stop = threading.Event()
    seen = []
    with real(tmp_path, place, admin_key=line.split(':')[1]) as server:
        def version(): return get(f'{server.url}/health').json()['model_version']
        def keep_asking():
            with httpx.Client(timeout=2*SECONDS) as client:
                while not stop.is_set():
                    r = client.post(f'{server.url}/predict/file', files={'files': data})
                    seen.append((r.status_code, r.json().get('model_version')))
        threads = [threading.Thread(target=keep_asking) for _ in range(4)]
        for t in threads: t.start()
        try:
            assert version()==versions[0]
            point_to('b')
            server.send_signal(signal.SIGHUP)
            until(lambda: 'reloads_total{outcome="done"} 1.0' in get(f'{server.url}/metrics').text, 'the reload')
            assert version()==versions[1]
            (tmp_path/'b'/'model.json').write_text('{}')
            r = post(f'{server.url}/v1/admin/reload', headers={'authorization': f'Bearer {admin}'})
            assert (r.status_code, r.json()['error_code'])==(409, 'reload_failed')
            assert 'changed_file' in r.json()['error_message'] and version()==versions[1]
            point_to('a')
            r = post(f'{server.url}/admin/reload', headers={'authorization': f'Bearer {admin}'})
            assert r.json()['previous_version']==versions[1] and version()==versions[0]
            assert post(f'{server.url}/admin/reload', headers={'x-api-key': 'amk_wrong'}).status_code==403
        finally:
            stop.set()
            for t in threads: t.join()
        assert {s for s,_ in seen}=={200} and {v for _,v in seen}==set(versions)

def test_keys_and_rates(trained, tmp_path):
    key,line = make_key('shop')
    (tmp_path/'keys').write_text(f'# who may\n{line}\n')
    (tmp_path/'service.toml').write_text(f'api_keys_file = "{tmp_path/"keys"}"\nrate_limit = 0.001\nrate_burst = 3\n')
    with real(tmp_path, trained/'bundle', settings=tmp_path/'service.toml') as server:
        def send(**headers): return post(f'{server.url}/predict/file', files={'files': photo()}, headers=headers)
        mine = {'x-api-key': key}
        assert [send(**h).status_code for h in ({}, {'x-api-key': 'amk_no'}, mine, {'authorization': f'Bearer {key}'},
                                                mine, mine)]==[401, 401, 200, 200, 200, 429]
        assert int(send(**{'x-api-key': key}).headers['retry-after']) > 100
        assert [get(f'{server.url}{p}').status_code for p in ('/health', '/docs', '/metrics', '/info')]==[200,
                200, 401, 401]
        told = server.log.read_text()
        assert '"caller": "shop"' in told and key not in told

@pytest.mark.parametrize('wrong,told',
                         [({'AMULET_PORT': 'http'}, 'AMULET_PORT'), ({'AMULET_QUEUE_SIZE': '-1'}, 'AMULET_QUEUE_SIZE'),
                                        ({'AMULET_HOST': '0.0.0.0'}, 'no keys are set'),
                                        ({'AMULET_SETTINGS': '/no/such/file.toml'}, 'No such file'),
                          ({'AMULET_QUEUE_SISE': '3'}, "Did you mean 'queue_size'"),
                                        ({'AMULET_API_KEYS': 'shop:sesam'}, 'no sha256'),
                          ({'AMULET_ANSWER_CACHE': 'redis:/sesam'}, 'AMULET_ANSWER_CACHE'),
                                        ({'AMULET_CORS_ORIGINS': '*'}, 'no web site')])
def test_a_wrong_setting_stops_the_start(tmp_path, wrong, told):
    "Before anything is loaded, in one line, and without a secret in it"
    command = [BIN/'amulet', 'serve', '--model-dir', tmp_path, '--database-url', 'off']
    done = subprocess.run(command, capture_output=True, text=True, timeout=60,
                          env=clean(**{'AMULET_PORT': 0, **wrong}), cwd=tmp_path)
    error = [line for line in done.stderr.splitlines() if line.startswith('error')]
    assert (done.returncode==1 and len(error)==1 and told in error[0] and 'sesam' not in done.stderr
            and 'Traceback' not in done.stderr)

def test_schemathesis_finds_nothing(trained, tmp_path):
    "What the document says is what the service does, for some seconds of requests that were made up from it"
    key,line = make_key('tester')
    with real(tmp_path, trained/'bundle', api_keys=line, log_level='warning') as server:
        env = {**os.environ, 'SCHEMATHESIS_HOOKS': 'schemathesis_hooks', 'PYTHONPATH': str(ROOT/'tests')}
        command = [BIN/'schemathesis', 'run', f'{server.url}/openapi.json', '-H', f'Authorization: Bearer {key}',
                   '--max-time', '12', '--checks', 'all', '--no-color']
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
        assert done.returncode==0, done.stdout[-6000:]
        assert 'Traceback' not in server.log.read_text()

PRELOADED = '''
import os, sys
from amulet_hybrid.serve.app import app
from fastapi.testclient import TestClient
def answers():
    with TestClient(app, base_url='http://localhost') as client, open(sys.argv[1], 'rb') as photo:
        found = client.post('/predict/file', files={'file': photo}).json()
    return found.get('recorded') and found['predicted_class' if found['predicted_class'] else 'top_class']
parents = [os.fork() for _ in range(3)]
if 0 in parents: os._exit(0 if answers() else 1)
assert answers()
sys.exit(any(os.waitpid(pid, 0)[1] for pid in parents))
'''

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a system that forks')
def test_any_server_can_run_the_app_and_preload_it(trained, tmp_path):
    "As `gunicorn --preload` does: loaded once, answered by forks, which record too; and by uvicorn"
    env = clean(AMULET_MODEL_DIR=trained/'bundle', AMULET_JOURNAL_DIR=tmp_path/'journal')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', PRELOADED, trained/'photo.png'], env=env,
                          capture_output=True, text=True, timeout=SECONDS*2)
    assert done.returncode==0, done.stderr[-3000:]
    port = free_port()
    command = [sys.executable, '-m', 'uvicorn', '--port', str(port), 'amulet_hybrid.serve.app:app']
    with subprocess.Popen(command, env=env|{'LOG_LEVEL': 'WARNING'}, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as server:
        def ready():
            with suppress(httpx.TransportError): return get(f'http://127.0.0.1:{port}/health/ready').status_code==200
        try:
            until(ready, 'a ready service')
            views = [('files', photo()), ('files', b'no photo'), ('files', (trained/'photo.png').read_bytes())]
            found = post(f'http://127.0.0.1:{port}/predict/file', files=views).json()
            assert found['success'] and 'Photo 2 of 3 was left out' in found['note'], found
        finally: server.terminate()
        assert '"level": "info"' not in server.stderr.read()

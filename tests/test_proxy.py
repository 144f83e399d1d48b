"""nginx as rendered, before replicas of which one is killed, and before callers who mean no good"""
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import free_ports
from test_deploy import KEYS, call, form, get, tool, until

from amulet_hybrid.deploy.rendering import PROXY_ERRORS, render_deployment, write_deployment
from amulet_hybrid.deploy.settings import DeploySettings


class Stand:
    "An upstream that does as it is told, and counts"
    def __init__(self, port, status=200, dies=False):
        stand = self
        self.asked,self.heads,self.open = 0,0,[]
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def setup(self): super().setup(); stand.open.append(self.connection)
            def content(self):
                if 'chunked' not in self.headers.get('Transfer-Encoding', ''):
                    return self.rfile.read(int(self.headers.get('Content-Length', 0)))
                parts = []
                while size := int(self.rfile.readline() or b'0', 16): parts.append(self.rfile.read(size+2))
                return b''.join(parts)
            def do_POST(self):
                stand.heads += 1
                self.content()
                stand.asked += 1
                if dies: self.connection.shutdown(socket.SHUT_RDWR); self.close_connection = True; return
                told = {k.lower(): v for k,v in self.headers.items()
                        if k.lower().startswith(('x-forwarded', 'x-real', 'forwarded'))}
                body = json.dumps({'port': port, 'id': self.headers.get('X-Request-ID'), 'told': told}).encode()
                self.send_response(status)
                if status==503: self.send_header('Retry-After', '7')
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            do_GET = do_PUT = do_POST
            def log_message(self, *words): pass
        class Server(ThreadingHTTPServer):
            daemon_threads,request_queue_size = True,128
            def handle_error(self, *args): pass # callers go away in the middle
        self.server = Server(('127.0.0.1', port), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': .02}, daemon=True).start()

    def close(self):
        "Go, and break off what is open, as a process that ends does"
        self.server.shutdown()
        self.server.server_close()
        for connection in self.open:
            with suppress(OSError): connection.shutdown(socket.SHUT_RDWR)

@pytest.fixture
def stands():
    "Makes upstreams, and ends them"
    made = []
    def make(*args, **kw):
        made.append(Stand(*args, **kw))
        return made[-1]
    yield make
    for stand in made: stand.close()

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

PHOTO_PATHS = ('/predict', '/v1/predict', '/predict/file', '/predict-batch', '/feedback', '/v1/feedback', '/anything')

@pytest.mark.parametrize('path', PHOTO_PATHS)
@pytest.mark.parametrize('chunked', [False, True], ids=['length', 'chunked'])
def test_what_broke_off_is_not_sent_to_a_second_replica(nginx, stands, tmp_path, path, chunked):
    "A photo that kills a replica kills one: whatever the address, and however the body is sent"
    s = nginx(tmp_path)
    dying = [stands(s.first_port+i, dies=True) for i in range(3)]
    body = iter([b'photo'*100]) if chunked else b'photo'*100
    status,headers,said = get(s.port, path, {}, 'POST', body)
    assert (status, json.loads(said)['error_code'])==(502, 'bad_gateway'), said
    assert sum(stand.asked for stand in dying)==1 and headers['Content-Type']=='application/json'

def test_methods_that_could_be_asked_twice_do_not_reach_a_replica(nginx, stands, tmp_path):
    "nginx repeats PUT and DELETE as it repeats GET, and a GET with its body"
    s = nginx(tmp_path)
    dying = [stands(s.first_port+i, dies=True) for i in range(3)]
    for method in ('PUT', 'DELETE', 'PATCH', 'PROPFIND'):
        status,_,said = get(s.port, '/predict', {}, method, b'photo')
        assert (status, json.loads(said)['error_code'])==(405, 'method_not_allowed')
    for method in ('GET', 'HEAD', 'OPTIONS'):
        for body in (b'photo', iter([b'photo'])): assert get(s.port, '/predict', {}, method, body)[0]==400
    assert sum(stand.heads for stand in dying)==0
    assert get(s.port, '/info')[0]==502 and sum(stand.asked for stand in dying) <= 3 # without a body it may be

def test_a_replica_that_cannot_be_reached_is_passed_over(nginx, stands, tmp_path):
    "And one that is busy has the last word: that is no failure, and the request not sent twice"
    s = nginx(tmp_path)
    fine = stands(s.first_port+2)
    for _ in range(20):
        status,_,body = get(s.port, '/v1/predict/file', {'X-Request-ID': 'asked-once'}, 'POST', b'photo')
        assert (status, json.loads(body)['port'], json.loads(body)['id'])==(200, s.first_port+2, 'asked-once')
    assert fine.asked==20
    busy = [stands(s.first_port+i, 503) for i in range(2)]
    until(lambda: get(s.port, '/predict', {}, 'POST', b'{}')[0]==503) # whoever was away is let in again
    before = fine.asked+sum(b.asked for b in busy)
    told = Counter(get(s.port, '/predict', {}, 'POST', b'{}')[0] for _ in range(30))
    assert set(told)=={200, 503} and fine.asked+sum(b.asked for b in busy)==before+30

def test_what_a_caller_says_of_itself_is_not_passed_on(nginx, stands, tmp_path):
    "The address is that of the connection, set and not appended"
    s = nginx(tmp_path)
    stands(s.first_port)
    lies = {'X-Forwarded-For': '6.6.6.6, 127.0.0.1', 'X-Forwarded-Proto': 'https', 'X-Forwarded-Host': 'evil.example',
            'X-Real-IP': '6.6.6.6', 'Forwarded': 'for=6.6.6.6'}
    for method,body in (('GET', None), ('POST', b'{}')):
        assert json.loads(get(s.port, '/info', lies, method, body)[2])['told']=={
            'x-forwarded-for': '127.0.0.1', 'x-forwarded-proto': 'http'}

def test_nobody_left(nginx, stands, tmp_path):
    "All busy: the replica's own word and its Retry-After; all gone: nginx's, in the same form"
    s = nginx(tmp_path)
    busy = [stands(s.first_port+i, 503) for i in range(3)]
    for _ in range(10):
        status,headers,body = get(s.port, '/predict', {}, 'POST', b'{}')
        assert (status, headers['Retry-After'])==(503, '7') and 'port' in json.loads(body)
    for stand in busy: stand.close()
    start = time.monotonic()
    status,headers,body = get(s.port, '/predict', {}, 'POST', b'{}')
    assert (status, headers['Retry-After'], json.loads(body)['error_code'])==(503, '2', 'busy')
    assert time.monotonic()-start < 4

def test_what_nginx_refuses(nginx, stands, tmp_path):
    s = nginx(tmp_path, max_batch_mb=1, max_photo_mb=1)
    asked = [stands(s.first_port+i) for i in range(3)]
    status,_,body = get(s.port, '/predict/file', {'Content-Length': str(4*2**20)}, 'POST', b'x'*100)
    assert (status, json.loads(body)['error_code'])==(413, 'image_too_large')
    for path in ('/metrics', '/v1/metrics', '/admin/reload', '/v1/admin/reload', '/metrics/', '//metrics',
                 '/x/../metrics', '/%6detrics', '/_error', '/_unanswered'):
        assert get(s.port, path)[0]==404, path
    assert get(s.port, '/health/ready')[0]==200 and sum(stand.asked for stand in asked)==1

def raw(port, data):
    "Status, headers and body of the answer to bytes that are no good request"
    with socket.create_connection(('127.0.0.1', port), 10) as sock:
        with suppress(OSError): sock.sendall(data)
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        return answer.status,dict(answer.getheaders()),answer.read()

def test_every_word_of_nginx_is_json(nginx, stands, tmp_path):
    "In the form of the service, with codes of its list, whatever was wrong"
    from amulet_hybrid.serve.schemas import HTTP_ERRORS, ErrorResponse
    assert all(code in HTTP_ERRORS and status in (0, HTTP_ERRORS[code][0]) for status,(code,*_) in PROXY_ERRORS.items())
    s = nginx(tmp_path, max_batch_mb=1, max_photo_mb=1)
    stands(s.first_port)
    host = b'Host: x\r\n'
    wrong = {400: [b'nonsense\r\n\r\n', b'GET / HTTP/1.1\r\n\r\n', b'GET / HTTP/1.1\r\n'+host+b'Host: y\r\n\r\n',
                   b'POST /predict HTTP/1.1\r\n'+host+b'Content-Length: x\r\n\r\n',
                   b'\x16\x03\x01\x02\x00\x01\x00\r\n\r\n',
                   b'POST /predict HTTP/1.1\r\n'+host+b'Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n',
                   b'POST /predict HTTP/1.1\r\n'+host+b'Transfer-Encoding: chunked\r\n\r\nzz\r\n'],
             404: [b'GET /metrics HTTP/1.1\r\n'+host+b'\r\n'],
             405: [b'TRACE / HTTP/1.1\r\n'+host+b'\r\n', b'BREW / HTTP/1.1\r\n'+host+b'\r\n'],
             413: [b'POST /predict HTTP/1.1\r\n'+host+b'Content-Length: 9999999999\r\n\r\n',
                   b'POST /predict HTTP/1.1\r\n'+host+b'Transfer-Encoding: chunked\r\n\r\n'
                   +(b'80000\r\n'+b'x'*2**19+b'\r\n')*9],
             414: [b'GET /'+b'x'*10_000+b' HTTP/1.1\r\n'+host+b'\r\n'],
             431: [b'GET / HTTP/1.1\r\n'+host+b'X: '+b'x'*40_000+b'\r\n\r\n'],
             501: [b'POST /predict HTTP/1.1\r\n'+host+b'Transfer-Encoding: gzip\r\n\r\n'],
             505: [b'GET / HTTP/3.0\r\n'+host+b'\r\n']}
    for status,requests in wrong.items():
        for data in requests:
            got,headers,body = raw(s.port, data)
            told = ErrorResponse(**json.loads(body))
            assert (got, headers['Content-Type'])==(status, 'application/json'), (data[:80], got, body)
            assert told.error_code in HTTP_ERRORS and told.request_id==headers['X-Request-ID'] and not told.success
    assert get(s.port, '/predict', {}, 'HEAD')[0] # still there

def test_tls_port_answers_plain_http_in_json(nginx, tmp_path):
    folder = tmp_path/'tls'
    folder.mkdir()
    call(tool('openssl', 'openssl'), 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes',
         '-subj', '/CN=a.example', '-days', '1', '-keyout', folder/'privkey.pem', '-out', folder/'fullchain.pem')
    s = nginx(tmp_path, tls_dir=str(folder))
    status,headers,body = get(s.port, '/')
    assert (status, json.loads(body)['error_code'], 'Strict-Transport-Security' in headers)==(400, 'bad_request', True)

def test_slow_callers_fill_no_disk_and_no_more_than_their_share(nginx, stands, tmp_path):
    """The replica has the head, and may refuse it, while the body is still to come; nothing of it lies in a file; one
    address has its share"""
    s = nginx(tmp_path, connections_per_client=20)
    replicas = [stands(s.first_port+i) for i in range(3)]
    head = b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n'
    slow = []
    try:
        for _ in range(20):
            slow.append(socket.create_connection(('127.0.0.1', s.port), 10))
            slow[-1].sendall(head+b'x'*1_000_000)
        until(lambda: sum(stand.heads for stand in replicas)==20)
        assert sum(stand.asked for stand in replicas)==0
        files = [p for p in tmp_path.rglob('*') if p.is_file() and p.parent.parent.name!='nginx']
        assert sum(p.stat().st_size for p in (tmp_path/'body').rglob('*') if p.is_file())==0
        assert sum(p.stat().st_size for p in files if p.suffix!='.conf') < 1_000_000
        for method in ('GET', 'POST'):
            status,headers,body = get(s.port, '/predict', {}, method, b'{}' if method=='POST' else None)
            assert (status, json.loads(body)['error_code'], headers['Retry-After'])==(429, 'rate_limited', '1')
        slow.pop().close()
        until(lambda: get(s.port, '/health')[0]==200)
    finally:
        for sock in slow: sock.close()

def test_a_flood_of_one_address_is_refused_by_nginx(nginx, stands, tmp_path):
    s = nginx(tmp_path, requests_per_client=1)
    replica = stands(s.first_port)
    told = Counter(get(s.port, '/predict', {'X-Forwarded-For': f'6.6.6.{i}'}, 'POST', b'{}')[0] for i in range(12))
    assert told[429] >= 8 and replica.asked==told[200] <= 4

def test_a_wrong_key_is_refused_before_the_body_is_there(nginx, replicas, tmp_path):
    "The real service behind nginx: 401 to whoever sends a head without a key, however much is announced"
    s = nginx(tmp_path)
    replicas(s.first_port, number=1, AMULET_API_KEYS=KEYS, AMULET_TRUSTED_PROXIES='127.0.0.1')
    for announced in (100, 50_000_000):
        with socket.create_connection(('127.0.0.1', s.port), 10) as sock:
            sock.sendall(b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                         b'Content-Length: %d\r\n\r\n{' % announced)
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            assert (answer.status, json.loads(answer.read())['error_code'])==(401, 'no_key')
    for _ in range(3): # and to whoever sends all of it at once
        status,_,body = get(s.port, '/predict', {'Content-Type': 'application/json', 'X-API-Key': 'wrong'}, 'POST',
                            b'x'*20_000_000)
        assert (status, json.loads(body)['error_code'])==(401, 'no_key')

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
    "Services on ports in a row"
    started = []
    def start(first, bundle=trained/'bundle', number=3, **more):
        env = os.environ|{'AMULET_DATABASE_URL': 'off', 'AMULET_JOURNAL_DIR': str(tmp_path/'journal'),
                          'AMULET_WORKERS': '1', 'AMULET_ANSWER_CACHE': 'off', **more}
        for i in range(number):
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
    "kill -9, in the middle of what it does: that is lost, and said so; all others go on"
    s = nginx(tmp_path, requests_per_client=10_000)
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
    assert len(load.failed) <= len(load.threads) # what it was working on
    assert {(status, json.loads(body)['error_code']) for status,body in load.failed} <= {(502, 'bad_gateway')}

def test_reload_one_after_the_other_under_load(nginx, replicas, trained, tmp_path):
    "Another bundle in place of the first, and SIGHUP: no request fails, and all replicas answer with the new one"
    from amulet_hybrid.model.bundle import load_bundle
    serving = tmp_path/'serving'
    shutil.copytree(trained/'bundle', serving)
    s = nginx(tmp_path, requests_per_client=10_000)
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

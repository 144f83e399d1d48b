"""A rendered Dockerfile carried out by hand, step by step, where there is no Docker engine: the same files,
environment, user and health check"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

OFFLINE = ('Connection', 'Temporary failure', 'No matching distribution', 'Network is unreachable')
ROOT = hasattr(os, 'geteuid') and os.geteuid()==0

def steps(text):
    "(instruction, arguments) of each step"
    for line in re.sub(r'\\\n', ' ', text).splitlines():
        if line.strip() and not line.startswith('#'): yield line.split(maxsplit=1)

def download(requirements, folder):
    "Wheels of these packages and of what they need, or a skip that says why there are none"
    (folder/'requirements.txt').write_text(requirements)
    done = subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--only-binary=:all:', '-d', folder, '-r',
                           folder/'requirements.txt'], capture_output=True, text=True)
    if done.returncode and any(words in done.stderr for words in OFFLINE):
        pytest.skip(f'no packages can be had here: {done.stderr.splitlines()[-1][:200]}')
    assert done.returncode==0, done.stderr[-2000:]

class Image:
    """What `docker build` would make. /opt/amulet and /var/lib/amulet lie in a folder of their own; a later stage has
    the paths of the one before, as in an image"""
    def __init__(self, context, install_dir, data_dir):
        self.context,self.places = Path(context),(install_dir, data_dir)
        self.home = Path(tempfile.mkdtemp(prefix='amulet-image-',
                                          dir='/var/tmp' if os.path.isdir('/var/tmp') else None))
        self.home.chmod(0o755) # others than root go through it
        self.base = self.home/'base'
        self.base.mkdir()
        (self.base/'python').write_text(f'#!/bin/sh\nexec {shlex.quote(str(Path(sys._base_executable).resolve()))} '
                                        f'"$@"\n')
        (self.base/'python').chmod(0o755)
        self.root = self.home/'root'
        self.stages = {}
        self.user = 0
        self.volumes = []
        for instruction,arguments in steps((self.context/'Dockerfile').read_text()):
            getattr(self, f'_{instruction.lower()}')(arguments)

    def at(self, text):
        "The same with paths of the image made ours"
        return re.sub('|'.join(rf'(?<![\w/]){re.escape(p)}(?![\w-])' for p in self.places),
                      lambda found: f'{self.root}{found[0]}', text)

    def _from(self, words):
        if self.root.exists(): self.root.rename(self.home/self.stage)
        self.stage = words.split()[2] if ' AS ' in words else 'last'
        self.root.mkdir()
        self.environment = {'PATH': f'{self.base}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'}

    def _env(self, words):
        for word in shlex.split(words):
            name,_,value = word.partition('=')
            self.environment[name] = self.at(value.replace('$PATH', self.environment['PATH']))

    def _run(self, command):
        if not ROOT: command = re.sub(r' -[og] \d+', '', command)
        kept = {k: v for k,v in os.environ.items() if k.startswith(('PIP_', 'HTTP', 'http', 'SSL', 'REQUESTS'))}
        done = subprocess.run(['sh', '-c', self.at(command)], cwd='/', env=kept|self.environment, capture_output=True,
                              text=True)
        assert done.returncode==0, f'{command}\n{done.stdout[-1000:]}{done.stderr[-2000:]}'

    def _copy(self, words):
        *source,target = words.split()
        stage = source.pop(0).removeprefix('--from=') if source[0].startswith('--from=') else ''
        for name in source:
            start = Path(f'{self.home/stage}{name}') if stage else self.context/name
            to = Path(self.at(target))
            if target.endswith('/'): to = to/start.name
            to.parent.mkdir(parents=True, exist_ok=True)
            linked = {'copy_function': os.link} if stage else {} # a stage before this one changes no more
            if start.is_dir(): shutil.copytree(start, to, symlinks=True, dirs_exist_ok=True, **linked)
            else: shutil.copy(start, to)

    def _user(self, words): self.user = int(words.split(':')[0])
    def _volume(self, words): self.volumes += [Path(self.at(p)) for p in words.split()]
    def _healthcheck(self, words): self.health = json.loads(self.at(words.partition(' CMD ')[2]))
    def _cmd(self, words): self.command = json.loads(words)
    def _expose(self, words): self.port = int(words)
    def _label(self, words): pass
    def _stopsignal(self, words): assert words=='SIGTERM'

    @property
    def python(self): return Path(self.at(f'{self.places[0]}/venv/bin/python'))

    def _inside(self, command):
        """As root on Linux: a read-only file system with only the volume and /tmp to write to, no capability, the
        image's user"""
        base = Path(sys._base_executable).resolve().parents[1]
        shut = next((p for p in reversed(base.parents) if not p.stat().st_mode & 1), None)
        lines = ['set -e', 'mount --make-rprivate /', *(f'mount --bind {p} {p}' for p in (self.root, *self.volumes)),
                 f'mount -o remount,bind,ro {self.root}']
        if shut:
            lines += [f'mkdir -p {self.home}/python', f'mount --bind {base} {self.home}/python',
                      f'mount -t tmpfs -o mode=755 tmpfs {shut}', f'mkdir -p {base}',
                      f'mount --bind {self.home}/python {base}']
        lines += ['mount -t tmpfs -o mode=1777 tmpfs /tmp', 'mount -o remount,bind,ro /', 'cd /',
                  f'exec setpriv --reuid {self.user} --regid {self.user} --clear-groups --no-new-privs '
                  f'--bounding-set=-all --inh-caps=-all {shlex.join(map(str, command))}']
        return ['unshare', '--mount', 'sh', '-c', '\n'.join(lines)]

    def start(self, command=None, **environment):
        "The process of a container; its output is in `.said`"
        command = command or self.command
        command = [shutil.which(command[0], path=self.environment['PATH']) or command[0], *command[1:]]
        env = self.environment | {k: str(v) for k,v in environment.items()}
        process = subprocess.Popen(self._inside(command) if ROOT else command, env=env, cwd='/',
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        process.said = []
        def listen():
            for line in process.stdout: process.said.append(line)
        process.listener = threading.Thread(target=listen, daemon=True)
        process.listener.start()
        return process

    def run(self, *command, **environment):
        "Exit code and output of a command in a container"
        process = self.start(command, **environment)
        process.wait(60)
        process.listener.join(5)
        return process.returncode,''.join(process.said)

    def remove(self): shutil.rmtree(self.home, ignore_errors=True)

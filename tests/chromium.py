"A headless Chromium over its DevTools pipe: no driver, no package, nothing that is downloaded"
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

FLAGS = ('--headless', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync',
         '--disable-extensions', '--disable-dev-shm-usage', '--hide-scrollbars', '--use-fake-device-for-media-stream',
         '--use-fake-ui-for-media-stream', '--remote-debugging-pipe')

class Chromium:
    "One browser; commands go in by file descriptor 3 and answers come out by 4, each ends with a zero byte"
    def __init__(self):
        program = next((p for name in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(name))),
                       None)
        if program is None:
            pytest.skip('no Chromium here: apt-get install chromium (Debian), or any Chrome on the PATH')
        self.profile = tempfile.mkdtemp(prefix='chromium-')
        self.last = 0
        self.rest = b''
        self.events = []
        (theirs_in,ours_out),(ours_in,theirs_out) = os.pipe(),os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]
        def wire(): os.dup2(high[0], 3); os.dup2(high[1], 4)
        root = ('--no-sandbox',) if hasattr(os, 'geteuid') and os.geteuid()==0 else ()
        self.process = subprocess.Popen([program, *FLAGS, *root, f'--user-data-dir={self.profile}', 'about:blank'],
                                        preexec_fn=wire, pass_fds=(3, 4), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (theirs_in, theirs_out, *high): os.close(fd)
        self.to,self.back = ours_out,ours_in

    def _read(self, seconds):
        "The next message"
        end = time.monotonic()+seconds
        while b'\0' not in self.rest:
            ready,_,_ = select.select([self.back], [], [], max(0, end-time.monotonic()))
            if not ready: raise TimeoutError(f'Chromium said nothing for {seconds} s')
            if not (data := os.read(self.back, 2**20)): raise RuntimeError('Chromium has ended')
            self.rest += data
        message,_,self.rest = self.rest.partition(b'\0')
        return json.loads(message)

    def call(self, method, session=None, seconds=30, **params):
        "Result of one command; events that come meanwhile are kept"
        self.last += 1
        os.write(self.to, json.dumps({'id': self.last, 'method': method, 'params': params,
                                      **({'sessionId': session} if session else {})}).encode()+b'\0')
        while True:
            message = self._read(seconds)
            if message.get('id')==self.last:
                if 'error' in message: raise RuntimeError(f'{method}: {message["error"]["message"]}')
                return message['result']
            self.events.append(message)

    def open(self, url, width=1280, height=900, dark=False, touch=False):
        return Page(self, url, width, height, dark, touch)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.to); os.close(self.back)
        shutil.rmtree(self.profile, ignore_errors=True)

class Page:
    "A tab"
    def __init__(self, browser, url, width, height, dark, touch):
        self.browser = browser
        target = browser.call('Target.createTarget', url='about:blank')['targetId']
        self.session = browser.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self.call(f'{domain}.enable')
        self.size(width, height, touch)
        media = {'prefers-color-scheme': 'dark' if dark else 'light', 'prefers-reduced-motion': 'reduce'}
        self.call('Emulation.setEmulatedMedia', features=[{'name': k, 'value': v} for k,v in media.items()])
        self.call('Page.navigate', url=url)
        self.wait('location.href!=="about:blank" && document.readyState==="complete"')

    def call(self, method, **params): return self.browser.call(method, session=self.session, **params)

    def size(self, width, height, touch=False):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=touch)

    def run(self, script):
        "Value of a JavaScript expression; a promise is waited for"
        got = self.call('Runtime.evaluate', expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        if 'exceptionDetails' in got:
            raise RuntimeError(got['exceptionDetails'].get('exception', {}).get('description')
                               or got['exceptionDetails']['text'])
        return got['result'].get('value')

    def wait(self, script, seconds=30):
        "Until the expression is true"
        end = time.monotonic()+seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f'{script} is still {value!r} after {seconds} s; the page says: '
                                   f'{self.run("document.body.innerText")[:800]}')
            time.sleep(.03)
        return value

    def centre(self, selector):
        box = f'document.querySelector({json.dumps(selector)}).getBoundingClientRect()'
        return self.run(f'(r => ({{x: r.x+r.width/2, y: r.y+r.height/2}}))({box})')

    def drop(self, selector, *files):
        "Drag files from outside onto an element"
        data,at = {'items': [], 'files': [str(f) for f in files], 'dragOperationsMask': 1},self.centre(selector)
        for kind in ('dragEnter', 'dragOver', 'drop'): self.call('Input.dispatchDragEvent', type=kind, data=data, **at)

    def click(self, selector):
        self.run(f'document.querySelector({json.dumps(selector)}).scrollIntoView({{block: "center"}})')
        at = self.centre(selector)
        for kind in ('mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, button='left', clickCount=1, **at)

    def press(self, key, code=0, text=''):
        for kind in ('keyDown', 'keyUp'):
            self.call('Input.dispatchKeyEvent', type=kind, key=key, windowsVirtualKeyCode=code,
                      **({'text': text} if text and kind=='keyDown' else {}))

    def text(self, selector): return self.run(f'document.querySelector({json.dumps(selector)}).innerText')

    def complaints(self):
        "What the console and the policy said against the page"
        self.run('1')
        told = [m['params'] for m in self.browser.events if m.get('sessionId')==self.session]
        logged = [p['entry']['text'] for p in told if 'entry' in p and p['entry']['level'] in ('error', 'warning')]
        return logged+[p['exceptionDetails']['text'] for p in told if 'exceptionDetails' in p]

    def requests(self):
        "Addresses of all that was asked for"
        return [m['params']['request']['url'] for m in self.browser.events if m.get('sessionId')==self.session
                and m['method']=='Network.requestWillBeSent']

    def screenshot(self, path):
        "The whole page, not only the part in view"
        size = self.call('Page.getLayoutMetrics')['cssContentSize']
        clip = {'x': 0, 'y': 0, 'width': size['width'], 'height': size['height'], 'scale': 1}
        Path(path).write_bytes(base64.b64decode(self.call('Page.captureScreenshot', format='png',
                                                          captureBeyondViewport=True, clip=clip)['data']))

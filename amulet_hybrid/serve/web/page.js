'use strict';
// Try a model with a photo. The page's script; it needs nothing but `<html data-base>`, the address of the service.

const BASE = document.documentElement.dataset.base;

// Helpers. Class names are folder names of anybody and messages come from elsewhere, so nothing is ever written as
// HTML: `make` sets text, and text only.

const $ = (id) => document.getElementById(id);
const make = (tag, more = {}, ...inside) => {
  const e = Object.assign(document.createElement(tag), more);
  e.append(...inside.filter((x) => x !== null && x !== undefined));
  return e;
};
const icon = (name) => {
  const s = document.createElementNS('http://www.w3.org/2000/svg', 'svg'),
    u = document.createElementNS(s.namespaceURI, 'use');
  u.setAttribute('href', '#' + name);
  s.setAttribute('aria-hidden', 'true');
  s.append(u);
  return s;
};
const pretty = (name) => String(name).replace(/_/g, ' ');
const percent = (p) =>
  p > 0.999 && p < 1
    ? 'over 99.9 %'
    : p < 0.001 && p > 0
      ? 'under 0.1 %'
      : (100 * p).toFixed(p < 0.1 || p > 0.99 ? 1 : 0) + ' %';
const time = (ms) =>
  ms < 10 ? ms.toFixed(1) + ' ms' : ms < 2000 ? Math.round(ms) + ' ms' : (ms / 1000).toFixed(1) + ' s';
const announce = (text) => {
  $('announcement').textContent = '';
  setTimeout(() => ($('announcement').textContent = text), 50);
};

// The service. Every way in which a request can fail becomes one object: message, advice, code, seconds to wait.
// Where a key is asked for, the page asks the user, keeps the key in a variable and repeats the request.

let key = '',
  info = { classes: [] },
  keyRequest = null;
const UNREACHABLE = {
  code: 'unreachable',
  message: 'The service cannot be reached.',
  advice: 'Check that it is running and that you are connected, then try again.',
};
const STATUS_MESSAGES = {
  413: 'The photo is too large.',
  429: 'Too many photos in a short time.',
  503: 'The service is busy.',
};

async function ask(path, options = {}) {
  let r,
    body = {};
  try {
    r = await fetch(BASE + path, { ...options, headers: { ...options.headers, ...(key ? { 'X-API-Key': key } : {}) } });
  } catch (e) {
    if (e.name === 'AbortError') throw e;
    throw { ...UNREACHABLE, message: e.name === 'TimeoutError' ? 'No answer came in time.' : UNREACHABLE.message };
  }
  try {
    body = await r.json();
  } catch (e) {
    if (e.name === 'AbortError') throw e;
  }
  if (r.status === 401 && (await askForKey(!!key))) return ask(path, options);
  if (r.ok) return body;
  const message = body.error_message || STATUS_MESSAGES[r.status] || `The service answered with status ${r.status}.`;
  throw {
    status: r.status,
    wait: Number(r.headers.get('Retry-After')) || 0,
    code: body.error_code || 'http_' + r.status,
    message,
    advice: body.advice || '',
    id: body.request_id,
  };
}

function askForKey(again) {
  return (keyRequest ||= new Promise((done) => {
    const box = $('key-box');
    $('key-title').textContent = again ? 'That key is not accepted' : 'This service asks for a key';
    $('key').value = '';
    box.onclose = () => {
      keyRequest = null;
      if (box.returnValue === 'use') key = $('key').value.trim();
      done(box.returnValue === 'use');
    };
    box.returnValue = '';
    box.showModal();
  }));
}

// Choosing photos: file chooser, drop, clipboard. Several are views of one thing. A file that the browser cannot draw
// is sent all the same: the service may be able to read it.

let photos = [],
  adding = false;
const picture = (file) => (file.url ||= URL.createObjectURL(file));

function preview(files) {
  const last = files.at(-1),
    size = files.reduce((n, f) => n + f.size, 0),
    mb = size < 1e6 ? Math.max(1, Math.round(size / 1e3)) + ' kB' : (size / 1e6).toFixed(1) + ' MB';
  $('drop').classList.add('full');
  $('shown').onerror = () => {
    $('shown').onerror = null;
    $('drop').classList.remove('full');
  }; // the browser cannot draw it; perhaps the service can
  $('shown').src = picture(last);
  $('shown').alt = last.name;
  $('strip').hidden = files.length < 2;
  $('strip').replaceChildren(...files.map((f) => make('li', {}, make('img', { src: picture(f), alt: f.name }))));
  $('name').textContent = (files.length > 1 ? files.length + ' photos of one thing' : last.name) + ', ' + mb;
  for (const id of ['name', 'more', 'fresh']) $(id).hidden = false;
}

function setPhotos(files, add = false) {
  files = [...files];
  if (!files.length) return;
  photos = add ? [...photos, ...files] : files;
  preview(photos);
  classify();
}

const openChooser = (more) => {
  adding = more;
  $('file').click();
};
$('fresh').onclick = () => openChooser(false);
$('more').onclick = () => openChooser(true);
$('file').onchange = (e) => {
  setPhotos(e.target.files, adding);
  adding = false;
  e.target.value = '';
};
$('file').oncancel = () => (adding = false);
for (const on of ['dragenter', 'dragover'])
  addEventListener(on, (e) => {
    e.preventDefault();
    $('main').classList.add('over');
  });
addEventListener('dragleave', (e) => {
  if (!e.relatedTarget) $('main').classList.remove('over');
});
addEventListener('drop', (e) => {
  e.preventDefault();
  $('main').classList.remove('over');
  if (e.dataTransfer.files.length) setPhotos(e.dataTransfer.files);
  else
    fail({
      code: 'no_file',
      message: 'That was a link, not a photo.',
      advice: 'Save the picture first, or copy it and paste it here.',
    });
});
addEventListener('paste', (e) => {
  const files = [...(e.clipboardData?.files || [])];
  if (files.length) {
    e.preventDefault();
    setPhotos(files);
  }
});

// The camera. Browsers open it only for pages from this machine or over HTTPS; on a phone without HTTPS its own camera
// app takes the photo.

$('snap').onclick = async () => {
  if (!navigator.mediaDevices) {
    // no https: the phone's own camera app
    $('file').setAttribute('capture', 'environment');
    openChooser(false);
    $('file').removeAttribute('capture');
    return;
  }
  try {
    $('video').srcObject = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: 'environment', width: { ideal: 1920 } },
    });
    $('camera-box').showModal();
  } catch (e) {
    const message = e.name === 'NotAllowedError' ? 'The camera may not be used.' : 'No camera was found.';
    fail({ code: 'no_camera', message, advice: 'Allow it in the browser, or choose a photo instead.' });
  }
};
$('leave').onclick = () => $('camera-box').close();
$('camera-box').onclose = () => {
  $('video')
    .srcObject?.getTracks()
    .forEach((t) => t.stop());
  $('video').srcObject = null;
};
$('shoot').onclick = () => {
  const v = $('video'),
    c = make('canvas', { width: v.videoWidth, height: v.videoHeight });
  if (!v.videoWidth) return;
  c.getContext('2d').drawImage(v, 0, 0);
  $('camera-box').close();
  c.toBlob((b) => setPhotos([new File([b], 'camera.jpg', { type: 'image/jpeg' })]), 'image/jpeg', 0.93);
};

// One request at a time: a new photo aborts the request for the last one, so the answer shown always belongs to the
// photo beside it.

let stop = null,
  current = 0;
const TIMEOUT_MS = 60000; // milliseconds that the page waits

async function classify() {
  stop?.abort();
  stop = new AbortController();
  const request = ++current,
    files = photos,
    form = new FormData(),
    start = performance.now(),
    signals = [stop.signal, AbortSignal.timeout(TIMEOUT_MS)];
  for (const f of files) form.append('files', f, f.name);
  $('main').classList.add('busy');
  $('answer').setAttribute('aria-busy', 'true');
  announce('Looking at the photo');
  try {
    const seen = await ask('predict/file', {
      method: 'POST',
      body: form,
      signal: AbortSignal.any ? AbortSignal.any(signals) : stop.signal,
    });
    if (request !== current) return;
    const entry = { files, seen, took: performance.now() - start };
    show(entry);
    remember(entry);
  } catch (e) {
    if (request === current && e.name !== 'AbortError') fail(e);
  } finally {
    if (request === current) finish();
  }
}

function finish() {
  $('main').classList.remove('busy');
  $('answer').removeAttribute('aria-busy');
  if (matchMedia('(max-width:52rem)').matches) $('answer').scrollIntoView({ block: 'nearest', behavior: 'smooth' });
}

function verdict(state, kind, what, ...lines) {
  $('answer').className = 'card ' + state;
  const parts = [['kind', kind], ['what', what], ...lines.map((t) => ['', t])]
    .filter((p) => p[1])
    .map(([className, textContent]) => make('p', { className, textContent }));
  return make(
    'div',
    { className: 'verdict' },
    icon({ sure: 'named', guess: 'unsure' }[state] || state),
    make('div', {}, ...parts),
  );
}

function fail(e) {
  const theirs = e.status >= 400 && e.status < 500 && e.status !== 429,
    retry = photos.length && !theirs && !e.code?.startsWith('no_');
  const code = [e.code, e.id].filter(Boolean).join(', ');
  const what = e.message
    ? e.message[0].toUpperCase() + e.message.slice(1).replace(/([^.!?])$/, '$1.')
    : 'Something went wrong on this page.';
  const advice = e.advice && e.advice.replace(/([^.!?])$/, '$1.');
  const box = verdict(
    'failed',
    theirs ? 'No answer for this photo' : 'No answer',
    what,
    advice,
    e.wait ? `It asks you to wait ${e.wait} s.` : '',
  );
  box.setAttribute('role', 'alert');
  const again = retry
    ? make('button', { type: 'button', className: 'main', textContent: 'Try again', onclick: classify })
    : null;
  $('out').replaceChildren(
    box,
    make('div', { className: 'row tools' }, again, make('span', { className: 'soft small', textContent: code })),
  );
}

// The answer in words. A probability is explained by what it was calibrated to mean: of a hundred answers as sure as
// this one, so many are right.

const ROUTES = {
  rules: 'the quickest part of the model (rules)',
  neural: 'the net alone',
  ensemble: 'the full ensemble',
};
const ADVICE = 'Another photo of the same thing, closer, sharper or from another side, often settles it.';

function verdictOf(s) {
  const top = pretty(s.top_class),
    n = Math.round(100 * s.confidence);
  const right =
    n > 99
      ? 'Nearly all answers as sure as this one are right.'
      : `Of 100 answers as sure as this one, about ${n} are right.`;
  if (s.predicted_class && n >= 60) return ['sure', n >= 90 ? 'It is' : 'Probably', pretty(s.predicted_class), right];
  if (s.predicted_class) return ['guess', 'A guess', pretty(s.predicted_class), right, ADVICE];
  if (/strange/i.test(s.reason || ''))
    return [
      'unseen',
      'Never seen',
      'Nothing that it knows',
      s.reason,
      `It comes closest to ${top}, but do not rely on that.`,
    ];
  return ['unsure', 'Not sure', `Perhaps ${top}`, s.reason, ADVICE];
}

function bars(s) {
  const rows = Object.entries(s.probabilities || {}).sort((a, b) => b[1] - a[1]),
    list = make('ol', { className: 'bars' }),
    first = rows.length > 6 ? 5 : 6;
  const bar = ([name, p], i) => {
    const fill = make('i'),
      line = make('span', { className: 't', ariaHidden: 'true' }, fill);
    fill.style.width = (100 * p).toFixed(2) + '%';
    return make(
      'li',
      { className: i ? '' : 'top' },
      make('span', { textContent: pretty(name) }),
      make('span', { className: 'n', textContent: percent(p) }),
      line,
    );
  };
  list.append(...rows.slice(0, first).map(bar));
  const others = make('button', {
    type: 'button',
    className: 'plain small',
    textContent: `Show all ${rows.length} classes`,
  });
  others.onclick = () => {
    list.append(...rows.slice(first).map((r) => bar(r, 1)));
    others.remove();
  };
  return rows.length > first ? [list, others] : [list];
}

function facts(s, took) {
  const strange =
    s.novelty === null || s.novelty === undefined ? '' : `stranger than ${percent(s.novelty)} of known photos`;
  const spent = Object.entries(s.timings_ms || {})
    .map(([k, v]) => `${k} ${time(v)}`)
    .join(', ');
  const rows = [
    ['Answered by', (ROUTES[s.route] || s.route || 'the model') + (s.cached ? ', from memory' : '')],
    ['How strange', strange],
    [
      'Time',
      s.processing_time_ms === undefined
        ? ''
        : `${time(s.processing_time_ms)} in the model, ${time(took)} there and back`,
    ],
    ['Of which', spent],
    ['Note', s.note],
    ['Model', s.model_version],
    ['Answer', s.prediction_id],
  ];
  return make(
    'dl',
    {},
    ...rows.filter((r) => r[1]).flatMap(([k, v]) => [make('dt', { textContent: k }), make('dd', { textContent: v })]),
  );
}

function show(entry) {
  const s = entry.seen,
    parts = verdictOf(s),
    set = s.prediction_set || [],
    title = parts[0] === 'unseen' ? 'If it were one of these after all' : 'How probable';
  const may =
    set.length > 1
      ? [
          make('h3', { textContent: `It is one of these in ${percent(s.coverage)} of such cases` }),
          make('ul', { className: 'chips' }, ...set.map((c) => make('li', { textContent: pretty(c) }))),
        ]
      : [];
  $('out').replaceChildren(
    verdict(...parts),
    make('h3', { textContent: title }),
    ...bars(s),
    ...may,
    ...feedback(entry),
    make('details', {}, make('summary', { textContent: 'How it was decided' }), facts(s, entry.took)),
    program(entry.files),
  );
  announce(parts.slice(1, 4).join('. ') + (s.predicted_class ? '' : `. ${percent(s.confidence)}`));
}

// After the answer: feedback, the same request as a command, and earlier photos. The history lives as long as the page.

function feedback(entry) {
  const s = entry.seen,
    box = make('div', { className: 'row' }),
    known = s.probabilities ? Object.keys(s.probabilities) : info.classes;
  if (!s.prediction_id) return [];
  const thanks = () =>
    box.replaceChildren(make('span', { className: 'soft', textContent: `Thank you, noted: ${pretty(entry.truth)}.` }));
  const send = async (truth) => {
    const body = JSON.stringify({ prediction_id: s.prediction_id, true_label: truth });
    try {
      await ask('feedback', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body });
      entry.truth = truth;
      thanks();
      announce('Thank you, it is noted.');
    } catch (e) {
      box.append(make('span', { className: 'small', role: 'alert', textContent: `${e.message} ${e.advice}` }));
    }
  };
  const names = known
    .filter((c) => c !== s.predicted_class)
    .sort()
    .map((c) => make('option', { value: c, textContent: pretty(c) }));
  const choice = make(
    'select',
    { ariaLabel: 'What it really is' },
    make('option', { value: '', textContent: s.predicted_class ? 'No, it is…' : 'It is…' }),
    ...names,
  );
  choice.onchange = () => choice.value && send(choice.value);
  if (entry.truth) thanks();
  else
    box.append(
      ...(s.predicted_class
        ? [make('button', { type: 'button', textContent: 'Yes', onclick: () => send(s.predicted_class) })]
        : []),
      choice,
    );
  return [make('h3', { textContent: s.predicted_class ? 'Is that right?' : 'Do you know what it is?' }), box];
}

function program(files) {
  const quote = (t) => (/^[\w@%+=:,./-]+$/.test(t) ? t : "'" + t.replace(/'/g, "'\\''") + "'"),
    sent = files.map((f) => '-F ' + quote('files=@' + f.name)).join(' ');
  const address = quote(String(new URL(BASE + 'predict/file', document.baseURI)));
  const text = `curl ${key ? '-H "X-API-Key: $AMULET_API_KEY" ' : ''}${sent} ${address}`;
  const pre = make('pre', { textContent: text, tabIndex: 0 }),
    done = make('span', { textContent: 'Copy' }),
    copy = make('button', { type: 'button' }, icon('copy'), done);
  copy.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text);
      done.textContent = 'Copied';
    } catch {
      getSelection().selectAllChildren(pre);
      done.textContent = 'Selected: press Ctrl C';
    }
    announce(done.textContent);
    setTimeout(() => (done.textContent = 'Copy'), 2500);
  };
  return make('details', {}, make('summary', { textContent: 'The same from a program' }), pre, copy);
}

const past = [];
function remember(entry) {
  past.unshift(entry);
  for (const f of past.splice(12).flatMap((e) => e.files))
    if (f.url && !past.some((e) => e.files.includes(f))) {
      URL.revokeObjectURL(f.url);
      f.url = '';
    }
  $('past').hidden = past.length < 2;
  $('list').replaceChildren(
    ...past.map((e) => {
      const parts = verdictOf(e.seen),
        name = make(
          'span',
          {},
          make('b', { textContent: parts[2] }),
          e.seen.predicted_class ? percent(e.seen.confidence) : parts[1].toLowerCase(),
        );
      return make(
        'li',
        {},
        make(
          'button',
          { type: 'button', onclick: () => again(e) },
          make('img', { src: picture(e.files[0]), alt: '' }),
          name,
        ),
      );
    }),
  );
}

function again(entry) {
  stop?.abort();
  current++;
  photos = entry.files;
  preview(photos);
  show(entry);
  finish();
}

// At the start: which model is served. Its card comes as Markdown of our own making (`card_markdown`), so a few lines
// can render it.

const plain = (t) => t.replace(/\\([\\`*_[\]<>|#])/g, '$1');

function card(markdown) {
  const cells = (line) =>
    line
      .replace(/^\||\|$/g, '')
      .split(/(?<!\\)\|/)
      .map((c) => plain(c.trim()));
  const table = (lines) =>
    make(
      'table',
      {},
      ...lines
        .filter((_, i) => i !== 1)
        .map((line, i) => make('tr', {}, ...cells(line).map((c) => make(i ? 'td' : 'th', { textContent: c })))),
    );
  return markdown
    .split(/\n{2,}/)
    .map((block) => block.trim())
    .filter(Boolean)
    .map((block) => {
      const lines = block.split('\n'),
        heading = block.match(/^(#+) (.*)/);
      if (heading) return heading[1].length > 1 ? make('h3', { textContent: plain(heading[2]) }) : null;
      if (block.startsWith('- '))
        return make('ul', {}, ...lines.map((line) => make('li', { textContent: plain(line.slice(2)) })));
      return block.startsWith('|')
        ? make('div', { className: 'scroll', tabIndex: 0 }, table(lines))
        : make('p', { textContent: plain(lines.join(' ')) });
    })
    .filter(Boolean);
}

(async () => {
  try {
    info = { classes: [], ...(await ask('info')) };
    const chips = () => [
      make('ul', { className: 'chips' }, ...info.classes.map((c) => make('li', { textContent: pretty(c) }))),
    ];
    $('state').textContent =
      `Ready: ${info.classes.length} classes` + (info.model_version ? `, model ${info.model_version}` : '');
    $('state').classList.add('up');
    const title = info.card?.match(/^# (.+)/)?.[1]; // the maker's, if it is more than a count
    if (title && !/^\d+ classes by /.test(title)) document.title = $('title').textContent = plain(title);
    $('card').replaceChildren(...(info.card ? card(info.card) : chips()));
    $('about').hidden = false;
    if (info.columns?.length)
      fail({
        code: 'no_photos',
        message: 'This model reads rows of a table, not photos.',
        advice: 'How to send one stands under "For programs", below.',
      });
  } catch (e) {
    const away = e.code === 'unreachable';
    $('state').textContent = away ? e.message : e.status === 401 ? 'A key is needed' : 'Ready';
    $('state').classList.add(away ? 'down' : 'up');
  }
})();

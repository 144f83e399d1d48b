'use strict';
// Try a model with a photo: one question and its answer. table.js (rows of a table) and batch.js (many at once) follow
// in the same script element. All they need is `<html data-base>`, the address of the service.

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
const size = (bytes) => (bytes < 1e6 ? Math.max(1, Math.round(bytes / 1e3)) + ' kB' : (bytes / 1e6).toFixed(1) + ' MB');
const total = (files) => files.reduce((n, f) => n + f.size, 0);
const time = (ms) =>
  ms < 10 ? ms.toFixed(1) + ' ms' : ms < 2000 ? Math.round(ms) + ' ms' : (ms / 1000).toFixed(1) + ' s';
const announce = (text) => {
  $('announcement').textContent = '';
  setTimeout(() => ($('announcement').textContent = text), 50);
};

const small = (textContent) => make('span', { className: 'soft small', textContent });
const capital = (t) => t[0].toUpperCase() + t.slice(1);
const sentence = (t) => t && t.replace(/([^.!?])$/, '$1.');

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
  429: 'Too much was asked in a short time.',
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
  throw problem(body, r.status, Number(r.headers.get('Retry-After')) || 0);
}

const problem = (body, status, wait = 0) => ({
  status,
  wait,
  code: body.error_code || 'http_' + status,
  message: body.error_message || STATUS_MESSAGES[status] || `The service answered with status ${status}.`,
  advice: body.advice || '',
  id: body.request_id,
});
const json = (value) => ({
  method: 'POST',
  headers: { 'Content-Type': 'application/json' },
  body: JSON.stringify(value),
});
function filesForm(files) {
  const body = new FormData();
  for (const f of files) body.append('files', f, f.name);
  return { method: 'POST', body };
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

// Choosing photos: file chooser, drop, clipboard. A file that the browser cannot draw is sent all the same: the service
// may be able to read it. Several may be views of one thing, or many things: the page asks which.

const AT_ONCE = 8; // more photos than this are not of one thing
let photos = [],
  adding = false,
  chosen = [];
const forRows = () => info.columns?.length > 0;
const nameOf = (file) => file.place || file.name; // `place`: its path in a folder that was dropped
const picture = (file) => (file.url ||= URL.createObjectURL(file));

// Frees the pictures that are no longer shown: neither beside the answer nor among the latest ones.
function release(files) {
  for (const f of files)
    if (f.url && !photos.includes(f) && !chosen.includes(f) && !past.some((e) => e.files?.includes(f))) {
      URL.revokeObjectURL(f.url);
      f.url = '';
    }
}

function preview(files) {
  const last = files.at(-1);
  $('drop').classList.add('full');
  $('shown').onerror = () => {
    $('shown').onerror = null;
    $('drop').classList.remove('full');
  }; // the browser cannot draw it; perhaps the service can
  $('shown').src = picture(last);
  $('shown').alt = nameOf(last);
  $('strip').hidden = files.length < 2;
  $('strip').replaceChildren(...(files.length > 1 ? files.map(thumbnail) : []));
  const words = chosen.length ? ' photos' : ' photos of one thing';
  $('name').textContent = (files.length > 1 ? files.length + words : nameOf(last)) + ', ' + size(total(files));
  for (const id of ['name', 'more', 'fresh']) $(id).hidden = false;
}

function thumbnail(file) {
  const label = `Remove this photo: ${nameOf(file)}`;
  return make(
    'li',
    {},
    make('img', { src: picture(file), alt: nameOf(file) }),
    make('button', { type: 'button', ariaLabel: label, title: label, onclick: () => removePhoto(file) }, icon('cross')),
  );
}

function removePhoto(file) {
  if (!$('choice').hidden) {
    const rest = chosen.filter((f) => f !== file);
    return rest.length > 1 ? choose(rest) : setPhotos(rest);
  }
  const at = photos.indexOf(file);
  setPhotos(photos.filter((f) => f !== file));
  ($('strip').querySelectorAll('button')[Math.min(at, photos.length - 1)] || $('more')).focus();
}

function setPhotos(files, add = false) {
  files = [...files];
  if (!files.length) return;
  const old = [...photos, ...chosen];
  photos = add ? [...photos, ...files] : files;
  chosen = [];
  $('choice').hidden = true;
  preview(photos);
  release(old);
  const wrong = overLimits(photos);
  if (!wrong) return classify({ files: photos });
  abandon();
  fail(wrong);
  finish();
}

// An empty place to drop the next one.
function clearPhotos() {
  abandon();
  const old = [...photos, ...chosen];
  photos = chosen = [];
  $('drop').classList.remove('full');
  $('shown').removeAttribute('src');
  for (const id of ['choice', 'strip', 'name', 'more', 'fresh']) $(id).hidden = true;
  release(old);
}

// What the service would refuse is said before it is sent; `info.limits` are the service's own.
function overLimits(files) {
  const { max_bytes = Infinity, max_photos = Infinity, max_batch_bytes = Infinity } = info.limits || {},
    most = Math.min(max_bytes, max_batch_bytes),
    large = files.find((f) => f.size > most),
    said = (code, message, advice) => ({ status: 413, code, message, advice });
  if (large)
    return said(
      'image_too_large',
      `The photo ${nameOf(large)} has ${size(large.size)}, and at most ${size(most)} are taken.`,
      'Save it smaller.',
    );
  if (files.length > max_photos)
    return said('too_many_photos', `At most ${max_photos} photos of one thing are taken.`, 'Leave some out.');
  if (total(files) > max_batch_bytes)
    return said('image_too_large', `Together they have more than ${size(max_batch_bytes)}.`, 'Leave some out.');
  return null;
}

// Photos from wherever. More than a few, or a whole folder, are of different things; of a few, the user says it.
function take(files, { add = false, folder = false, note = '' } = {}) {
  files = [...files];
  if (forRows()) return takeTable(files);
  if (!files.length) return note ? fail({ code: 'no_file', message: note, advice: 'Drop another one.' }) : undefined;
  if (add || (files.length === 1 && !folder)) return setPhotos(files, add);
  return folder || files.length > AT_ONCE ? startBatch(files.map(photoItem), note) : choose(files);
}

function choose(files) {
  abandon();
  const old = photos;
  chosen = files;
  photos = [];
  preview(files);
  release(old);
  $('more').hidden = true;
  $('choice-title').textContent = `What are these ${files.length} photos of?`;
  $('choice').hidden = false;
  waitingText('Say first what they are of', 'Views of one thing get one answer. Different things get one each.');
  ($('different-things').classList.contains('main') ? $('different-things') : $('one-thing')).focus();
  announce($('choice-title').textContent);
}

// The button that was pressed last is the first to be offered next time.
function choice(pressed, act) {
  $(pressed).onclick = () => {
    for (const id of ['one-thing', 'different-things']) $(id).classList.toggle('main', id === pressed);
    act(chosen);
  };
}
choice('one-thing', (files) => setPhotos(files));
choice('different-things', (files) => startBatch(files.map(photoItem)));
$('one-thing').classList.add('main');

const openChooser = (more) => {
  adding = more;
  $('file').click();
};
$('fresh').onclick = () => openChooser(false);
$('more').onclick = () => openChooser(true);
$('file').onchange = (e) => {
  const files = [...e.target.files];
  e.target.value = '';
  take(files, { add: adding && photos.length > 0 });
  adding = false;
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
  if (!e.dataTransfer.files.length && e.target.matches('#row-form :is(input, textarea)')) return; // a word for a field
  e.preventDefault();
  $('main').classList.remove('over');
  const entries = [...e.dataTransfer.items].map((i) => i.webkitGetAsEntry?.()).filter(Boolean);
  if (entries.some((i) => i.isDirectory)) takeFolders(entries);
  else if (e.dataTransfer.files.length) take(e.dataTransfer.files);
  else
    fail({
      code: 'no_file',
      message: 'That was a link or a text, not a file.',
      advice: 'Save it first, or copy it and paste it here.',
    });
});
addEventListener('paste', (e) => {
  const files = [...(e.clipboardData?.files || [])];
  if (files.length) {
    e.preventDefault();
    take(files);
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

// One request at a time: a new question aborts the request for the last one, so the answer shown always belongs to what
// stands beside it. An entry is a question (`files` of one thing, or the `features` of a row) and its answer (`seen`).

let stop = null,
  current = 0,
  question = null;
const TIMEOUT_MS = 60000; // milliseconds that the page waits

const within = (signal) =>
  AbortSignal.any ? AbortSignal.any([signal, AbortSignal.timeout(TIMEOUT_MS)]) : signal;
const requestOf = (entry) =>
  entry.features ? ['predict', json({ features: entry.features })] : ['predict/file', filesForm(entry.files)];

function abandon() {
  stop?.abort();
  current++;
  question = null;
  $('main').classList.remove('busy');
  $('answer').removeAttribute('aria-busy');
  $('back').hidden = true;
}

async function classify(entry) {
  abandon();
  stop = new AbortController();
  question = entry;
  $('back').hidden = !entry.update;
  const request = current,
    start = performance.now(),
    [path, options] = requestOf(entry);
  $('main').classList.add('busy');
  $('answer').setAttribute('aria-busy', 'true');
  announce(`Looking at the ${thing()}`);
  try {
    const seen = await ask(path, { ...options, signal: within(stop.signal) });
    if (request !== current) return;
    Object.assign(entry, { seen, took: performance.now() - start, error: null });
    show(entry);
    remember(entry);
    entry.update?.();
  } catch (e) {
    if (request === current && e.name !== 'AbortError') fail(e);
  } finally {
    if (request === current) finish();
  }
}

function finish() {
  $('main').classList.remove('busy');
  $('answer').removeAttribute('aria-busy');
  if (narrow.matches) $('answer').scrollIntoView({ block: 'nearest', behavior: 'smooth' });
}
const narrow = matchMedia('(max-width:52rem)');
const thing = () => (forRows() ? 'row' : 'photo');

function waitingText(title, text) {
  $('answer').className = 'card';
  $('out').replaceChildren(
    make(
      'div',
      { className: 'empty' },
      make('p', {}, make('b', { textContent: title })),
      make('p', { textContent: text }),
    ),
  );
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
    entry = question;
  const code = [e.code, e.id].filter(Boolean).join(', ');
  const box = verdict(
    'failed',
    theirs ? `No answer for this ${thing()}` : 'No answer',
    e.message ? sentence(capital(e.message)) : 'Something went wrong on this page.',
    sentence(e.advice),
    e.wait ? `It asks you to wait ${e.wait} s.` : '',
  );
  box.setAttribute('role', 'alert');
  const again =
    entry && !theirs && !e.code?.startsWith('no_')
      ? make('button', { type: 'button', className: 'main', textContent: 'Try again', onclick: () => classify(entry) })
      : null;
  $('out').replaceChildren(box, make('div', { className: 'row tools' }, again, small(code)));
}

// The answer in words. A probability is explained by what it was calibrated to mean: of a hundred answers as sure as
// this one, so many are right.

const ROUTES = {
  rules: 'the quickest part of the model (rules)',
  neural: 'the net alone',
  ensemble: 'the full ensemble',
};
const ADVICE = {
  photo: 'Another photo of the same thing, closer, sharper or from another side, often settles it.',
  row: 'Values for the fields that are still empty often settle it.',
};

function verdictOf(s) {
  const top = pretty(s.top_class),
    n = Math.round(100 * s.confidence);
  const right =
    n > 99
      ? 'Nearly all answers as sure as this one are right.'
      : `Of 100 answers as sure as this one, about ${n} are right.`;
  if (s.predicted_class && n >= 60) return ['sure', n >= 90 ? 'It is' : 'Probably', pretty(s.predicted_class), right];
  if (s.predicted_class) return ['guess', 'A guess', pretty(s.predicted_class), right, ADVICE[thing()]];
  if (/strange/i.test(s.reason || ''))
    return [
      'unseen',
      'Never seen',
      'Nothing that it knows',
      s.reason,
      `It comes closest to ${top}, but do not rely on that.`,
    ];
  return ['unsure', 'Not sure', `Perhaps ${top}`, s.reason, ADVICE[thing()]];
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
  const blind = s.novelty === null || s.novelty === undefined;
  const strange = [blind ? '' : `stranger than ${percent(s.novelty)} of known ${thing()}s`, s.novelty_note]
    .filter(Boolean)
    .join('; ');
  const spent = Object.entries(s.timings_ms || {})
    .map(([k, v]) => `${k} ${time(v)}`)
    .join(', ');
  const rows = [
    ['Answered by', (ROUTES[s.route] || s.route || 'the model') + (s.cached ? ', from memory' : '')],
    ['How strange', strange],
    ['Least confidence', s.confidence_threshold > 0 ? `${percent(s.confidence_threshold)} for a name` : ''],
    [
      'Time',
      s.processing_time_ms === undefined
        ? ''
        : `${time(s.processing_time_ms)} in the model` + (took ? `, ${time(took)} there and back` : ''),
    ],
    ['Of which', spent],
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
  const note = s.note ? make('p', { className: 'note', textContent: sentence(s.note) }) : null;
  const may =
    set.length > 1
      ? [
          make('h3', { textContent: `It is one of these in ${percent(s.coverage)} of such cases` }),
          make('ul', { className: 'chips' }, ...set.map((c) => make('li', { textContent: pretty(c) }))),
        ]
      : [];
  $('out').replaceChildren(
    ...[verdict(...parts), note].filter(Boolean),
    make('h3', { textContent: title }),
    ...bars(s),
    ...may,
    ...why(entry),
    ...feedback(entry),
    make('details', {}, make('summary', { textContent: 'How it was decided' }), facts(s, entry.took)),
    program(entry),
  );
  announce(
    [...parts.slice(1, 4), s.predicted_class ? '' : percent(s.confidence), s.note].filter(Boolean).join('. '),
  );
}

// Why: where the photo speaks for its class, and the training photos that are most like it, of each of the most
// probable classes; and whether it passes for a class that somebody names. Asked for when somebody wants it.

const asBase64 = (file) =>
  new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(',') + 1));
    reader.onerror = () => failed({ message: `${nameOf(file)} can no longer be read.`, advice: 'Choose it again.' });
    reader.readAsDataURL(file);
  });

function why(entry) {
  if (!entry.files) return [];
  const said = make('span', { className: 'small', role: 'alert' }),
    shown = make('div', {}),
    row = make('div', { className: 'row' });
  const show = async (control, parts) => {
    control.disabled = true;
    said.textContent = '';
    try {
      const image_data = await asBase64(entry.files[0]);
      shown.replaceChildren(...(await parts((path, options) => ask(path, json({ image_data, ...options })))));
    } catch (e) {
      said.textContent = `${sentence(capital(e.message))} ${e.advice || ''}`;
    }
    control.disabled = false;
  };
  if (info.sums || info.explains?.includes('photos')) row.append(whyButton(entry, show));
  if (info.verifies) row.append(claimChoice(show));
  return row.children.length ? [make('div', { className: 'why' }, row, said, shown)] : [];
}

function whyButton(entry, show) {
  const rows = Object.entries(entry.seen.probabilities || {}).sort((a, b) => b[1] - a[1]),
    within = rows.length ? rows.slice(0, 3).map(([name]) => name) : [entry.seen.top_class],
    button = make('button', { type: 'button', textContent: 'Show me why' });
  button.onclick = () =>
    show(button, async (why) => {
      const sum = info.sums ? await why('explain', {}) : null,
        found = info.explains?.includes('photos') ? (await why('similar', { within, k: 4 })).photos : [];
      announce(
        [sum?.words, found.length ? `${found.length} training photos that are most like it are shown.` : '']
          .filter(Boolean)
          .join(' '),
      );
      return [...(sum ? sumOf(sum) : []), ...(found.length ? within.flatMap((name) => likeOf(name, found)) : [])];
    });
  return button;
}

function sumOf(sum) {
  const title = `Where it speaks for ${pretty(sum.label)} rather than ${pretty(sum.against)}`;
  return [
    make('h3', { textContent: title }),
    ...(sum.overlay ? [make('img', { className: 'map', src: sum.overlay, alt: title })] : []),
    make('p', { className: 'note', textContent: sum.words }),
  ];
}

function claimChoice(show) {
  const choice = make(
    'select',
    { ariaLabel: 'Does it pass for' },
    make('option', { value: '', textContent: 'Does it pass for…' }),
    ...[...info.classes].sort().map((c) => make('option', { value: c, textContent: pretty(c) })),
  );
  choice.onchange = () => {
    if (!choice.value) return;
    show(choice, async (why) => {
      const found = await why('verify', { label: choice.value, k: 4 });
      announce(found.words);
      const name = pretty(found.label),
        title = found.accepted ? `It passes for ${name}` : `It does not pass for ${name}`;
      return [
        make('h3', { className: 'claim', textContent: title }),
        make('p', { className: 'note', textContent: found.words }),
        ...(found.photos.length ? likeOf(found.label, found.photos) : []),
      ];
    });
  };
  return choice;
}

function likeOf(name, photos) {
  const known = photos.filter((p) => p.label === name);
  return [
    make('h3', { textContent: `Most like it among photos of ${pretty(name)}` }),
    make(
      'ul',
      { className: 'like' },
      ...known.map((p) => {
        const far =
          p.usual === null ? `distance ${p.distance.toFixed(2)}` : `${percent(p.usual)} of known photos are no nearer`;
        return make(
          'li',
          { title: `distance ${p.distance.toFixed(3)}` },
          p.thumbnail ? make('img', { src: p.thumbnail, alt: `A known photo of ${pretty(name)}` }) : small(p.digest),
          small(far),
        );
      }),
    ),
  ];
}

// After the answer: feedback, the same request as a command, and earlier photos. The history lives as long as the page.

function feedback(entry) {
  const s = entry.seen,
    box = make('div', { className: 'row' }),
    said = make('span', { className: 'small', role: 'alert' }),
    known = s.probabilities ? Object.keys(s.probabilities) : info.classes;
  if (!s.prediction_id) return [];
  const thanks = () =>
    box.replaceChildren(make('span', { className: 'soft', textContent: `Thank you, noted: ${pretty(entry.truth)}.` }));
  const send = async (truth) => {
    said.textContent = '';
    try {
      await ask('feedback', json({ prediction_id: s.prediction_id, true_label: truth }));
      entry.truth = truth;
      thanks();
      announce('Thank you, it is noted.');
    } catch (e) {
      said.textContent = `${sentence(capital(e.message))} ${e.advice}`;
    }
  };
  const names = known
    .filter((c) => c !== s.predicted_class)
    .sort()
    .map((c) => make('option', { value: c, textContent: pretty(c) }));
  const other = make('option', { textContent: 'Something else…' }),
    field = otherName(send);
  const choice = make(
    'select',
    { ariaLabel: 'What it really is' },
    make('option', { value: '', textContent: s.predicted_class ? 'No, it is…' : 'It is…' }),
    ...names,
    other,
  );
  choice.onchange = () => {
    field.hidden = !other.selected;
    if (other.selected) field.querySelector('input').focus();
    else if (choice.value) send(choice.value);
  };
  const yes = s.predicted_class
    ? make('button', { type: 'button', textContent: 'Yes', onclick: () => send(s.predicted_class) })
    : null;
  if (entry.truth) thanks();
  else box.append(...[yes, choice, field, said].filter(Boolean));
  return [make('h3', { textContent: s.predicted_class ? 'Is that right?' : 'Do you know what it is?' }), box];
}

// A name that is not on the list: the service takes any, of 1 to 200 letters and on one line.
function otherName(send) {
  const called = { ariaLabel: 'Its name', placeholder: 'Its name' },
    input = make('input', { type: 'text', maxLength: 200, required: true, ...called }),
    form = make('form', { className: 'row other', hidden: true }, input, make('button', { textContent: 'Send' }));
  form.onsubmit = (e) => {
    e.preventDefault();
    const name = input.value.replace(/[\x00-\x1f\x7f]/g, ' ').trim();
    if (name) send(name);
    else input.value = '';
  };
  return form;
}

function program({ files, features }) {
  const quote = (t) => (/^[\w@%+=:,./-]+$/.test(t) ? t : "'" + t.replace(/'/g, "'\\''") + "'"),
    sent = features
      ? `-H "Content-Type: application/json" -d ${quote(JSON.stringify({ features }))}`
      : files.map((f) => '-F ' + quote('files=@' + nameOf(f))).join(' ');
  const address = quote(String(new URL(BASE + (features ? 'predict' : 'predict/file'), document.baseURI)));
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
  if (!past.includes(entry)) past.unshift(entry);
  release(past.splice(12).flatMap((e) => e.files || []));
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
      const image = e.files ? make('img', { src: picture(e.files[0]), alt: '' }) : icon('table');
      return make('li', {}, make('button', { type: 'button', onclick: () => again(e) }, image, name));
    }),
  );
}

// Shows an earlier question with its answer, or with the reason why there is none.
function again(entry) {
  abandon();
  const old = [...photos, ...chosen];
  question = entry;
  chosen = [];
  $('back').hidden = !entry.update;
  $('choice').hidden = true;
  if (entry.features) fillFields(entry.features);
  else preview((photos = entry.files));
  release(old);
  if (entry.seen) show(entry);
  else fail(entry.error);
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
    const own = () => info.refusal?.threshold === info.confidence_threshold;
    const chips = () => [
      make('ul', { className: 'chips' }, ...info.classes.map((c) => make('li', { textContent: pretty(c) }))),
    ];
    $('state').textContent =
      `Ready: ${info.classes.length} classes` + (info.model_version ? `, model ${info.model_version}` : '');
    $('state').classList.add('up');
    const title = info.card?.match(/^# (.+)/)?.[1]; // the maker's, if it is more than a count
    if (title && !/^\d+ classes by /.test(title)) document.title = $('title').textContent = plain(title);
    const least = info.confidence_threshold;
    const limits = [
      least > 0 ? `It gives no name where its confidence is below ${percent(least)}${own() ? ', by itself' : ''}.` : '',
      info.novelty_note,
    ].filter(Boolean);
    $('card').replaceChildren(
      ...limits.map((textContent) => make('p', { className: 'note', textContent })),
      ...(info.card ? card(info.card) : chips()),
    );
    $('about').hidden = false;
    if (forRows()) setFields(info.columns);
  } catch (e) {
    const away = e.code === 'unreachable';
    $('state').textContent = away ? e.message : e.status === 401 ? 'A key is needed' : 'Ready';
    $('state').classList.add(away ? 'down' : 'up');
  }
})();

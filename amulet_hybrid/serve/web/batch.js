// Many at once: photos of different things, or the rows of a file. They are asked in small chunks, so that progress is
// seen and a stop is quick; each has its own answer or error. An item is an entry as in page.js, with a `name`.

const CHUNK = { photo: 8, row: 100 }, // asked in one request
  CHUNK_BYTES = 2 ** 25,
  MAX_ITEMS = 10000,
  MAX_LINES = 1000, // of the table; the file has all
  TRIES = 6,
  BUSY = [429, 503, 507], // they say when to come again
  PASSING = ['busy', 'rate_limited', 'out_of_memory', 'not_recorded', 'journal_full', 'timed_out', 'internal_error'];
let batch = null;

const photoItem = (file) => ({ name: nameOf(file), files: [file] });
const unanswered = (item) => !item.seen && (!item.error || PASSING.includes(item.error.code));
const sayBatch = (text) => ($('batch-said').textContent = [text, batch.note].filter(Boolean).join(' '));

function startBatch(items, note = '') {
  closeBatch();
  if (items.length > MAX_ITEMS)
    note = `Only the first ${MAX_ITEMS} of ${items.length} are asked (amulet predict takes any number). ${note}`;
  batch = { items: items.slice(0, MAX_ITEMS), note, key: null, descending: false, stop: null, quarter: 0 };
  batch.items.forEach((item, i) => (item.position = i));
  clearPhotos();
  waitingText('Answers come into the list', `Choose a line there to see all that is said of that ${thing()}.`);
  $('batch').hidden = false;
  $('main').classList.add('many');
  $('batch').classList.toggle('rows', forRows());
  $('batch-title').textContent = `${batch.items.length} ${thing()}s`;
  sortBatch(null);
  $('batch').scrollIntoView({ block: 'nearest' });
  runBatch(batch);
  $('halt').focus({ preventScroll: true });
}

function closeBatch() {
  if (!batch) return;
  batch.stop?.abort();
  const files = batch.items.flatMap((item) => item.files || []);
  for (const item of batch.items) item.update = item.line = null;
  batch = null;
  thumbnails.disconnect();
  $('rows').replaceChildren();
  $('batch').hidden = $('back').hidden = true;
  $('main').classList.remove('many');
  release(files);
}

// The requests. A chunk that fails as a whole is asked again one by one, so that one bad photo spoils no other one;
// where the service is busy or away, the batch halts and can go on later.

function* chunksOf(items) {
  const { max_photos = 1, max_batch_bytes = Infinity } = info.limits || {},
    most = forRows() ? CHUNK.row : Math.min(CHUNK.photo, max_photos),
    room = Math.min(CHUNK_BYTES, max_batch_bytes);
  let chunk = [],
    bytes = 0;
  for (const item of items) {
    const more = total(item.files || []);
    if (chunk.length && (chunk.length === most || bytes + more > room)) {
      yield chunk;
      chunk = [];
      bytes = 0;
    }
    chunk.push(item);
    bytes += more;
  }
  if (chunk.length) yield chunk;
}

async function runBatch(run) {
  const { signal } = (run.stop = new AbortController());
  let trouble = null;
  for (const item of run.items) item.update?.();
  showProgress();
  announce(`${run.items.length} ${thing()}s: looking at them`);
  try {
    for (const chunk of chunksOf(run.items.filter(unanswered))) {
      await answerChunk(chunk, signal);
      if (signal.aborted) break;
      for (const item of chunk) item.update?.();
      showProgress();
    }
  } catch (e) {
    if (e.name !== 'AbortError') trouble = e;
  }
  if (run !== batch) return; // it was closed
  run.stop = null;
  if (run.key) sortBatch(run.key);
  else for (const item of run.items) item.update?.();
  showProgress();
  const words = trouble ? `${sentence(capital(trouble.message))} ${sentence(trouble.advice)}` : '';
  sayBatch([words, summary(run.items)].filter(Boolean).join(' '));
  announce($('batch-said').textContent);
}

async function answerChunk(items, signal) {
  for (const item of items) item.error = await unsendable(item);
  const sent = items.filter((item) => !item.error);
  if (!sent.length) return;
  const options = forRows() ? json({ rows: sent.map((i) => i.features) }) : filesForm(sent.map((i) => i.files[0]));
  try {
    const { results } = await patiently(() => ask('predict-batch', { ...options, signal: within(signal) }), signal);
    if (results?.length !== sent.length) throw problem({ error_code: 'bad_answer' }, 502);
    results.forEach((r, i) => {
      if (r.success) sent[i].seen = r;
      else sent[i].error = problem(r, PASSING.includes(r.error_code) ? 503 : 422);
    });
  } catch (e) {
    if (signal.aborted || e.code === 'unreachable' || e.status === 401 || BUSY.includes(e.status)) throw e;
    if (sent.length === 1) sent[0].error = e;
    else for (const item of sent) await answerChunk([item], signal);
  }
}

// Why an item cannot be sent: too large, not on the disk any more, or a row without a value. Null where it can.
async function unsendable({ files, features }) {
  const said = (code, message, advice) => ({ status: 422, code, message, advice });
  if (features)
    return Object.keys(features).length ? null : said('no_features', 'The row is empty.', 'Fill in a column.');
  const wrong = overLimits(files);
  if (wrong) return wrong;
  try {
    await files[0].slice(0, 1).arrayBuffer();
    return null;
  } catch {
    return said('no_file', 'The file cannot be read any more.', 'Drop it again.');
  }
}

async function patiently(send, signal) {
  for (let tries = 1; ; tries++) {
    try {
      return await send();
    } catch (e) {
      if (!BUSY.includes(e.status) || tries === TRIES) throw e;
      const seconds = Math.min(e.wait || 2 ** tries, 60);
      sayBatch(`The service is busy: asked again in ${seconds} s.`);
      await pause(1000 * seconds, signal);
      sayBatch('');
    }
  }
}

const pause = (ms, signal) =>
  new Promise((done, failed) => {
    const timer = setTimeout(done, ms);
    signal.addEventListener('abort', () => {
      clearTimeout(timer);
      failed(signal.reason);
    });
  });

// Progress. A screen reader is told at each quarter of a long batch and at the end, not of every photo.

function showProgress() {
  const { items, stop } = batch,
    left = items.filter(unanswered).length,
    done = items.filter((item) => item.seen || item.error).length,
    quarter = items.length < 20 ? 0 : Math.floor((4 * done) / items.length);
  $('progress').max = items.length;
  $('progress').value = done;
  $('progress-text').textContent = `${done} of ${items.length}`;
  if (!stop && document.activeElement === $('halt')) $('batch-title').focus({ preventScroll: true });
  $('halt').hidden = !stop;
  $('resume').hidden = Boolean(stop) || !left;
  $('save').disabled = !done;
  if (stop) sayBatch('');
  if (stop && quarter > batch.quarter && quarter < 4) announce(`${done} of ${items.length}`);
  batch.quarter = quarter;
}

function summary(items) {
  const named = items.filter((item) => item.seen?.predicted_class).length,
    unsure = items.filter((item) => item.seen).length - named,
    failed = items.filter((item) => item.error).length,
    rest = items.length - named - unsure - failed;
  const parts = [
    [named, 'named'],
    [unsure, 'not sure or never seen'],
    [failed, 'without an answer'],
    [rest, 'not asked'],
  ];
  return (
    parts
      .filter(([n]) => n)
      .map(([n, words]) => `${n} ${words}`)
      .join(', ') + '.'
  );
}

$('halt').onclick = () => {
  batch.stop?.abort();
  $('batch-title').focus();
};
$('resume').onclick = () => {
  runBatch(batch);
  $('halt').focus();
};
$('forget').onclick = () => {
  closeBatch();
  waitingText('The answer comes here', 'How sure it is, and what else it might be.');
};

// The table. Pictures are drawn from the files only while their line is in view, so hundreds of photos take no memory.

const thumbnails = new IntersectionObserver(
  (changes) => {
    for (const { target, isIntersecting } of changes) {
      if (isIntersecting) target.src = picture(target.file);
      else if (target.src) {
        target.removeAttribute('src');
        release([target.file]);
      }
    }
  },
  { root: $('batch-scroll'), rootMargin: '150px' },
);

function lineOf(item) {
  if (item.line) return item.line;
  const name = make('button', { type: 'button', className: 'plain', textContent: item.name }),
    cell = (className, ...inside) => make('td', { role: 'cell', className }, ...inside),
    [thumb, what, sure] = ['thumb', 'what', 'n'].map((c) => cell(c));
  item.line = make('tr', { role: 'row', onclick: () => openLine(item) }, thumb, cell('', name), what, sure);
  if (item.files) {
    const image = make('img', { alt: '', width: 40, height: 40, file: item.files[0] });
    image.onerror = () => image.classList.add('blank'); // the browser cannot draw it
    thumb.append(image);
    thumbnails.observe(image);
  }
  item.update = () => {
    const [state, kind, words] = item.seen ? verdictOf(item.seen) : ['', '', ''],
      doubt = `${kind}: ${words && words[0].toLowerCase() + words.slice(1)} `;
    name.disabled = !item.seen && !item.error;
    item.line.className = item.error ? 'failed' : state;
    sure.textContent = item.seen ? percent(item.seen.confidence) : '';
    if (item.error)
      what.replaceChildren(
        mark('failed'),
        sentence(capital(item.error.message)) + ' ',
        small(sentence(item.error.advice)),
      );
    else if (item.seen?.predicted_class) what.replaceChildren(mark(state), words);
    else if (item.seen) what.replaceChildren(mark(state), doubt, small(item.seen.reason));
    else what.replaceChildren(small(batch.stop ? '…' : 'not asked'));
  };
  return item.line;
}

const mark = (state) => icon({ sure: 'named', guess: 'unsure' }[state] || state);

function openLine(item) {
  if (!item.seen && !item.error) return;
  for (const line of $('rows').querySelectorAll('[aria-current]')) line.removeAttribute('aria-current');
  item.line.setAttribute('aria-current', 'true');
  again(item);
  $('back').textContent = `Back to the list of ${batch.items.length}`;
  $('back').onclick = () => {
    item.line.scrollIntoView({ block: 'center' });
    item.line.querySelector('button').focus();
  };
  (narrow.matches ? $('answer') : $('main')).scrollIntoView({ block: 'start' });
  $('back').focus({ preventScroll: true });
}

const certainty = (item) => item.seen?.confidence ?? -1;
const ORDERS = {
  name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
  confidence: (a, b) => certainty(a) - certainty(b),
};

// By a column; null: as they came. Only so many lines are drawn, those that come first.
function sortBatch(key) {
  batch.key = key;
  const sign = batch.descending ? -1 : 1,
    order = key ? (a, b) => sign * ORDERS[key](a, b) : () => 0,
    drawn = [...batch.items].sort((a, b) => order(a, b) || a.position - b.position).slice(0, MAX_LINES);
  $('rows').replaceChildren(...drawn.map(lineOf));
  for (const item of drawn) item.update();
  for (const k of Object.keys(ORDERS)) {
    if (k === key) $('by-' + k).setAttribute('aria-sort', batch.descending ? 'descending' : 'ascending');
    else $('by-' + k).removeAttribute('aria-sort');
  }
}
for (const key of Object.keys(ORDERS))
  $('by-' + key).firstElementChild.onclick = () => {
    batch.descending = batch.key === key && !batch.descending;
    sortBatch(key);
  };

// The file. A cell that a spreadsheet would take for a formula gets an apostrophe before it.

const CSV = {
  file: (i) => i.name,
  label: (i) => i.seen?.predicted_class,
  confidence: (i) => i.seen?.confidence,
  reason: (i) => (i.seen ? i.seen.reason : i.error ? '' : 'not asked'),
  error_code: (i) => i.error?.code,
  error_message: (i) => i.error?.message,
  prediction_id: (i) => i.seen?.prediction_id,
  model_version: (i) => i.seen?.model_version,
};

function csvCell(value) {
  let text = String(value ?? '');
  if (/^[=+\-@\t\r]/.test(text)) text = "'" + text;
  return /[",;\t\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
}

function csvOf(items) {
  const lines = [Object.keys(CSV), ...items.map((item) => Object.values(CSV).map((of) => of(item)))];
  return '\ufeff' + lines.map((line) => line.map(csvCell).join(',') + '\r\n').join(''); // the mark: UTF-8, for Excel
}

$('save').onclick = () => {
  const href = URL.createObjectURL(new Blob([csvOf(batch.items)], { type: 'text/csv' }));
  make('a', { href, download: 'predictions.csv' }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
};

// Folders that were dropped, with all below them. Their listing comes in parts.

const PHOTO_NAME = /\.(jpe?g|jfif|png|webp|gif|bmp|dib|tiff?|heic|heif|avif)$/i;

async function takeFolders(entries) {
  const files = [],
    others = [];
  const fileOf = (entry) => new Promise((done, failed) => entry.file(done, failed));
  const partOf = (reader) => new Promise((done, failed) => reader.readEntries(done, failed));
  const walk = async (entry) => {
    if (files.length > MAX_ITEMS || entry.name.startsWith('.')) return;
    if (entry.isDirectory) {
      const reader = entry.createReader();
      for (let part; (part = await partOf(reader)).length; ) for (const e of part) await walk(e);
    } else if (PHOTO_NAME.test(entry.name) || entries.includes(entry))
      files.push(Object.assign(await fileOf(entry), { place: entry.fullPath.slice(1) }));
    else others.push(entry.name);
  };
  announce('Reading the folder');
  try {
    for (const entry of entries) await walk(entry);
  } catch (e) {
    return fail({ code: 'no_file', message: 'The folder cannot be read.', advice: e.message });
  }
  files.sort((a, b) => a.place.localeCompare(b.place, undefined, { numeric: true }));
  const note = others.length ? `Left out, as no photos: ${others.length} (${others.slice(0, 3).join(', ')}…).` : '';
  take(files, { folder: true, note: files.length ? note : 'There are no photos in that folder.' });
}

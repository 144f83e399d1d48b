// Models of a table: a field for each column. What is pasted, a line of a spreadsheet, of a CSV file or of JSON, fills
// the fields; so does a header with a line below it, in any order.

const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?(e[+-]?\d+)?$/i, // as JSON has them: 007 stays a word
  MISSING = /^(|na|n\/a|#n\/a|nan|<na>|null|none)$/i;
const fields = new Map(); // column -> its input

function valueOf(text) {
  const t = text.trim(),
    number = Number(t);
  if (MISSING.test(t)) return null;
  if (/^(true|false)$/i.test(t)) return t.toLowerCase() === 'true';
  return NUMBER.test(t) && isFinite(number) && (!Number.isInteger(number) || Number.isSafeInteger(number)) ? number : t;
}

// The features of cells or fields: [column, text] pairs, those that are missing left out.
const featuresOf = (pairs) =>
  Object.fromEntries(pairs.map(([k, text]) => [k, valueOf(text)]).filter(([, value]) => value !== null));

function setFields(columns) {
  for (const name of columns) fields.set(name, make('input', { type: 'text', spellcheck: false }));
  $('fields').replaceChildren(
    ...columns.map((name) => make('label', {}, make('span', { textContent: name }), fields.get(name))),
  );
  $('find-label').hidden = columns.length <= 12;
  for (const id of ['form', 'tools']) $(id).hidden = true;
  $('row-form').hidden = false;
  $('ask').textContent = 'Your row';
  $('purpose').textContent = 'What a row of a table is, and how sure that is';
}

// Returns how many fields are filled.
function fillFields(features) {
  const values = new Map(Object.entries(features));
  for (const [name, input] of fields) input.value = values.get(name) ?? '';
  return [...fields.values()].filter((input) => input.value).length;
}

// Cells of a text: separated by what the first line has most of, quoted as RFC 4180 says. Where there are as many
// semicolons as commas, the commas are decimal ones.
function readCells(text) {
  text = text.replace(/^\ufeff/, '');
  const first = text.slice(0, text.search(/[\r\n]|$/)),
    separator = ['\t', ';', ','].reduce((a, b) => (first.split(b).length > first.split(a).length ? b : a)),
    cell = new RegExp(`("[^"]*(?:""[^"]*)*"|[^${separator}\r\n]*)(${separator}|\r\n|\n|\r|$)`, 'gy'),
    lines = [[]];
  for (const [, found, end] of text.matchAll(cell)) {
    const content = /^".*"$/s.test(found) ? found.slice(1, -1).replaceAll('""', '"') : found,
      comma = separator !== ',' && /^\s*[+-]?\d*,\d+\s*$/.test(content); // a decimal comma
    lines.at(-1).push(comma ? content.replace(',', '.') : content);
    if (!end) break;
    if (end !== separator) lines.push([]);
  }
  return lines.filter((line) => line.some((c) => c.trim()));
}

// Column -> text of what was pasted, or a sentence that says why there is none.
function readPasted(text) {
  if (text.trim().startsWith('{')) {
    try {
      const value = JSON.parse(text);
      return (fields.has('features') ? null : value.features) || value;
    } catch {
      return 'This begins like JSON, but it cannot be read as JSON.';
    }
  }
  const lines = readCells(text),
    header = lines[0]?.map((c) => c.trim()) || [];
  if (lines.length > 1 && header.some((c) => fields.has(c)))
    return Object.fromEntries(header.map((c, i) => [c, lines[1][i] ?? '']));
  if (header.length === fields.size) return Object.fromEntries([...fields.keys()].map((c, i) => [c, header[i]]));
  return `${header.length} values, but ${fields.size} columns. With the line of column names above, any order will do.`;
}

$('row-text').oninput = () => {
  const text = $('row-text').value,
    found = text.trim() ? readPasted(text) : '';
  if (typeof found === 'string') return ($('row-said').textContent = found);
  const texts = Object.fromEntries(Object.entries(found).map(([k, v]) => [k, v === null ? '' : String(v).trim()])),
    unknown = Object.keys(texts).filter((k) => !fields.has(k)),
    filled = fillFields(texts);
  $('row-said').textContent =
    `${filled} of ${fields.size} fields filled.` +
    (unknown.length ? ` Not among the columns: ${unknown.slice(0, 5).join(', ')}.` : '');
};
$('find').oninput = () => {
  const wanted = $('find').value.trim().toLowerCase();
  for (const label of $('fields').children) label.hidden = !label.textContent.toLowerCase().includes(wanted);
};
$('clear').onclick = () => {
  $('row-form').reset();
  $('row-said').textContent = '';
  $('find').oninput();
};
$('row-form').onsubmit = (e) => {
  e.preventDefault();
  const features = featuresOf([...fields].map(([name, input]) => [name, input.value]));
  if (Object.keys(features).length) return classify({ features });
  abandon();
  fail({ code: 'no_features', message: 'All fields are empty.', advice: 'Fill in at least one of them.', status: 422 });
};

// A CSV file: every row is a question. Columns that the model does not have are left out, and that is said.

$('many-rows').onclick = () => $('csv').click();
$('csv').onchange = (e) => {
  const files = [...e.target.files];
  e.target.value = '';
  if (files.length) takeTable(files);
};

async function takeTable(files) {
  const refuse = (message, advice) => {
    abandon();
    fail({ code: 'no_table', message, advice, status: 422 });
  };
  const advice = 'Drop one CSV file whose first line names the columns.';
  if (files.length !== 1 || files[0].type.startsWith('image/'))
    return refuse('This model reads rows of a table, not photos.', advice);
  let lines;
  try {
    lines = readCells(await files[0].text());
  } catch {
    return refuse(`The file ${files[0].name} cannot be read.`, advice);
  }
  const header = (lines.shift() || []).map((c) => c.trim()),
    places = header.map((c, i) => [c, i]).filter(([c]) => fields.has(c)),
    lacking = [...fields.keys()].filter((c) => !header.includes(c)),
    unknown = header.filter((c) => c && !fields.has(c));
  if (!places.length || !lines.length)
    return refuse(`The file ${files[0].name} has no rows with columns that this model knows.`, advice);
  const list = (names) => names.slice(0, 5).join(', ') + (names.length > 5 ? ` and ${names.length - 5} more` : '');
  const note = [
    lacking.length ? `Missing in the file: ${list(lacking)}.` : '',
    unknown.length ? `Left out, as the model does not have them: ${list(unknown)}.` : '',
  ];
  startBatch(
    lines.map((line, i) => ({
      name: `Row ${i + 1}`,
      features: featuresOf(places.map(([c, at]) => [c, line[at] ?? ''])),
    })),
    note.filter(Boolean).join(' '),
  );
}

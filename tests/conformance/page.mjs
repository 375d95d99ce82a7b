// The status page in a browser, as people see it: what it shows, that it is live, and that it asks nobody but the
// daemon. Chromium is spoken to over a pipe (DevTools protocol) and ends when the pipe does.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Isorun } from 'isorun';

const { ISORUN_API_URL: base, ISORUN_API_KEY: key, PAGE_PICTURES: pictures } = process.env;
const client = new Isorun();
const home = mkdtempSync(join(tmpdir(), 'page-'));
const flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync', '--remote-debugging-pipe', `--user-data-dir=${home}`, 'about:blank'];
const browser = spawn('chromium', flags, { stdio: ['ignore', 'ignore', 'ignore', 'pipe', 'pipe'] });
const gone = new Promise((resolve) => browser.on('exit', resolve));

// Messages are JSON, each ended by a NUL.
const waiting = new Map();
const events = [];
let [number, rest] = [0, ''];
browser.stdio[4].setEncoding('utf8').on('data', (text) => {
  const messages = (rest + text).split('\0');
  rest = messages.pop();
  for (const message of messages.map((json) => JSON.parse(json))) {
    if (message.id) waiting.get(message.id)(message);
    else events.push(message);
  }
});
let session;
const tell = async (method, params = {}) => {
  const id = ++number;
  browser.stdio[3].write(`${JSON.stringify({ id, method, params, sessionId: session })}\0`);
  const { result, error } = await Promise.race([new Promise((resolve) => waiting.set(id, resolve)), gone.then(() => ({ error: 'the browser is gone' }))]);
  assert.equal(error, undefined, `${method}: ${JSON.stringify(error)}`);
  return result;
};
const look = async (expression) => {
  const { result, exceptionDetails } = await tell('Runtime.evaluate', { expression, awaitPromise: true, returnByValue: true });
  assert.equal(exceptionDetails, undefined, `${expression}: ${JSON.stringify(exceptionDetails)}`);
  return result.value;
};
// What is not there yet may be an exception: the page may still be the one before.
const sees = async (what, expression) => {
  const soon = `(async () => { try { return Boolean(${expression}); } catch { return false; } })()`;
  for (let turns = 0; !(await look(soon)); turns++) {
    assert.ok(turns < 600, `the page shows no ${what}: ${await look('document.body.innerText')}`);
    await new Promise((wake) => setTimeout(wake, 100));
  }
};
const picture = async (name) => {
  if (!pictures) return;
  const { data } = await tell('Page.captureScreenshot', { captureBeyondViewport: true });
  writeFileSync(join(pictures, `${name}.png`), Buffer.from(data, 'base64'));
};
const screen = (width, height) => tell('Emulation.setDeviceMetricsOverride', { width, height, deviceScaleFactor: 1, mobile: false });

const { targetId } = await tell('Target.createTarget', { url: 'about:blank' });
session = (await tell('Target.attachToTarget', { targetId, flatten: true })).sessionId;
for (const domain of ['Page', 'Runtime', 'Log', 'Network']) await tell(`${domain}.enable`);
await screen(1280, 900);

// A pool that is ready, a sandbox out of it, and an error whose text would be markup if it could.
while ((await (await fetch(`${base}/v1/pools`, { headers: { authorization: `Bearer ${key}` } })).json()).pools[0].ready < 1) {
  await new Promise((wake) => setTimeout(wake, 100));
}
const first = await client.create({ timeoutSec: 0 });
await assert.rejects(client.create({ image: '<b onclick=alert(1)>Bold' }));

await tell('Page.navigate', { url: `${base}/` });
await sees('form', `document.readyState === 'complete' && !document.getElementById('login').hidden`);
await picture('login');
await look(`document.getElementById('key').focus()`);
await tell('Input.insertText', { text: key });
await look(`document.querySelector('#login button').click(); window.marker = 'not loaded again'`);

const cell = (table, row, head) => `document.querySelector('#${table} tr[data-key${row}] td[data-head^="${head}"]')?.textContent`;
await sees('sandbox', `${cell('sandboxes', `="${first.id}"`, 'Status')} === 'running'`);
await sees('hit rate', `${cell('pools', '', 'Hit')} === '100.0 %'`);
await sees('checkout latency', `/^\\d+ µs|ms/.test(${cell('pools', '', 'Checkout')})`);
await sees('create', `/: 1(,|$)/.test(document.getElementById('histogram').getAttribute('aria-label'))`);
await sees('bar', `[...document.querySelectorAll('#histogram i')].some((bar) => bar.offsetHeight > 50)`);
await sees('error', `${cell('errors', '', 'Code')} === 'bad_input' && ${cell('errors', '', 'Error')}.includes('<b onclick')`);
assert.equal(await look(`document.querySelectorAll('table b').length`), 0);
assert.equal(await look('location.href'), `${base}/`);

// Live: what comes and goes is shown without a reload, and rows that stay are the same.
await look(`window.row = document.querySelector('[data-key="${first.id}"]'); 0`);
const second = await client.create({ timeoutSec: 0 });
await sees('second sandbox', `${cell('sandboxes', `="${second.id}"`, 'Status')} === 'running'`);
await second.hibernate();
await sees('hibernation', `${cell('sandboxes', `="${second.id}"`, 'Status')} === 'hibernated'`);
await picture('wide');
await second.destroy();
await sees('end', `!document.querySelector('[data-key="${second.id}"]')`);
assert.ok(await look(`window.row.isConnected && window.marker === 'not loaded again'`));

// Narrow and dark: nothing sticks out, and text stands apart from what it stands on.
const luminance = (property) => `(() => {
  const [r, g, b] = getComputedStyle(document.body)['${property}'].match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; })()`;
for (const scheme of ['light', 'dark']) {
  await tell('Emulation.setEmulatedMedia', { features: [{ name: 'prefers-color-scheme', value: scheme }] });
  for (const width of [1280, 360]) {
    await screen(width, 800);
    assert.ok((await look('document.documentElement.scrollWidth')) <= width, `${scheme}, ${width}: something sticks out`);
    await picture(`${scheme}-${width}`);
  }
  const [text, ground] = [await look(luminance('color')), await look(luminance('backgroundColor'))];
  assert.equal(ground < 0.2, scheme === 'dark');
  assert.ok((Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05) > 7, `${scheme}: ${text} on ${ground}`);
}

// A reload keeps the key; no request left the daemon; nothing was complained about.
await tell('Page.reload');
await sees('same sandbox after a reload', `window.marker === undefined && ${cell('sandboxes', `="${first.id}"`, 'Status')} === 'running'`);
const asked = events.filter(({ method }) => method === 'Network.requestWillBeSent').map(({ params }) => params.request.url);
assert.ok(asked.length > 8);
assert.deepEqual(asked.filter((url) => !url.startsWith(`${base}/`) && !url.startsWith('data:')), []);
const complaints = events.filter(({ method, params }) => method === 'Runtime.exceptionThrown' || method === 'Log.entryAdded' ||
  (method === 'Runtime.consoleAPICalled' && ['error', 'warning', 'assert'].includes(params.type)));
assert.deepEqual(complaints.map(({ params }) => params), []);

// Without the key it is a form again; with a wrong one it says so.
await look(`sessionStorage.setItem('key', 'wrong')`);
await tell('Page.reload');
await sees('refusal', `!document.getElementById('login').hidden && document.getElementById('state').textContent.includes('not valid')`);

await first.destroy();
client.close();
browser.stdio[3].end();
await gone;
rmSync(home, { recursive: true, force: true, maxRetries: 5 });

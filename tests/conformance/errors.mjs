// Every error that the OpenAPI document names, provoked; keys and tenants; what a client must be told.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { copyFileSync, mkdirSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { DatabaseSync } from 'node:sqlite';

const { ISORUN_API_URL: base, ISORUN_API_KEY: key, PEREGRINE: program, PEREGRINE_STATE: state } = process.env;
const seen = new Map();
const call = async (method, path, { body, raw, headers = {}, as = key } = {}) => {
  const response = await fetch(base + path, {
    method,
    headers: { ...(as ? { authorization: `Bearer ${as}` } : {}), ...headers },
    body: raw ?? (body === undefined ? undefined : JSON.stringify(body)),
  });
  const text = await response.text();
  const value = /json/.test(response.headers.get('content-type')) ? JSON.parse(text) : text;
  return { status: response.status, value, headers: response.headers };
};
const fails = async (code, method, path, options) => {
  const { status, value, headers } = await call(method, path, options);
  assert.equal(value.code, code, `${method} ${path}: ${JSON.stringify(value)}`);
  assert.ok(value.error.length > 3);
  if ([429, 503].includes(status)) assert.ok(Number(headers.get('retry-after')) >= 1, `${code} says when to come back`);
  seen.set(code, status);
};
const mint = (tenant) => execFileSync(program, ['--state', state, 'key', 'create', '--tenant', tenant]).toString().trim();
const document = (await call('GET', '/openapi.json', { as: null })).value;
assert.equal((await call('GET', '/healthz', { as: null })).status, 200);

// Every route of the document is answered, and needs a key unless it says otherwise.
for (const [path, methods] of Object.entries(document.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const at = path.replace('{id}', 'run00000000000000000000').replace('{port}', '80').replace('{path}', 'x');
    const { status, value } = await call(method.toUpperCase(), at, { as: null });
    if (operation.security.length) assert.equal(value.code, 'unauthorized', `${method} ${at}`);
    else assert.equal(status, 200, `${method} ${at}`);
    const known = await call(method.toUpperCase(), at);
    assert.ok(!['no_route', 'method_not_allowed'].includes(known.value.code), `${method} ${at}: ${JSON.stringify(known.value)}`);
    if (known.status === 201 && known.value.id?.startsWith('run')) await call('DELETE', `/v1/runs/${known.value.id}`);
  }
}

// Keys: wrong, cut, of another secret, revoked.
await fails('unauthorized', 'GET', '/v1/runs', { as: null });
for (const bad of ['x', key.slice(0, -1), key.replace(/.$/, (c) => (c === '0' ? '1' : '0')), `${key}0`, key.replace('dev-', 'root-')]) {
  await fails('unauthorized', 'GET', '/v1/runs', { as: bad });
}
const revoked = mint('gone');
assert.equal((await call('GET', '/v1/runs', { as: revoked })).status, 200);
execFileSync(program, ['--state', state, 'key', 'revoke', revoked]);
await fails('unauthorized', 'GET', '/v1/runs', { as: revoked });

const sandbox = (await call('POST', '/v1/runs', { body: { timeout: 0 } })).value;
const at = `/v1/runs/${sandbox.id}`;
const exec = (command, timeout = 240) => ({ body: { command, timeout } });

// Another tenant sees nothing of it.
const other = mint('other');
for (const [method, path] of [['GET', at], ['DELETE', at], ['POST', `${at}/exec`], ['POST', `${at}/fork`], ['GET', `${at}/audit`], ['GET', `${at}/files?path=/`]]) {
  await fails('sandbox_not_found', method, path, { as: other, ...(method === 'POST' ? exec('true') : {}) });
}
assert.deepEqual((await call('GET', '/v1/runs', { as: other })).value, { runs: [] });

for (const body of [{ vcpus: 0 }, { mem_mib: 1 }, { vcpus: 'many' }, { timeout: 'soon' }, { env: { 'A=B': '' } }, { network_profile: 'nowhere' }]) {
  await fails('bad_input', 'POST', '/v1/runs', { body });
}
for (const raw of ['{', '[]', '\xff\xfe', '['.repeat(5000), '{"vcpus":1,"vcpus":2}']) await fails('bad_input', 'POST', '/v1/runs', { raw });
for (const body of [{}, { command: '' }, { command: [] }, { command: 'x', timeout: 0 }, { command: 'a\0b' }]) {
  await fails('bad_input', 'POST', `${at}/exec`, { body });
}
await fails('bad_input', 'POST', `${at}/fork`, { body: { count: 0 } });
await fails('bad_input', 'GET', `${at}/terminal`);
await fails('no_route', 'GET', '/v1/nothing');
await fails('no_route', 'GET', '/nothing');
await fails('method_not_allowed', 'PUT', '/v1/runs');
await fails('sandbox_not_found', 'GET', '/v1/runs/run00000000000000000000');
await fails('snapshot_not_found', 'DELETE', '/v1/snapshots/snap0');

// Images: a registry on loopback that knows none, lets nobody in, or is broken, by the image's name.
const registry = createServer((request, response) => {
  const status = request.url.includes('/closed') ? 403 : request.url.includes('/broken') ? 400 : 404;
  const errors = status === 404 ? [{ code: 'MANIFEST_UNKNOWN', message: 'manifest unknown' }] : [];
  response.writeHead(request.url === '/v2/' ? 200 : status, { 'content-type': 'application/json' });
  response.end(JSON.stringify({ errors }));
});
await new Promise((resolve) => registry.listen(0, '127.0.0.1', resolve));
const image = (name) => ({ body: { image: `127.0.0.1:${registry.address().port}/${name}` } });
await fails('image_not_found', 'POST', '/v1/runs', image('no/such'));
await fails('image_refused', 'POST', '/v1/runs', image('closed/image'));
await fails('registry_failed', 'POST', '/v1/runs', image('broken/image'));
await fails('bad_input', 'POST', '/v1/runs', { body: { image: 'No Name' } });
registry.close();
await fails('pool_not_found', 'DELETE', '/v1/pools/none');
await fails('stream_not_found', 'POST', `${at}/exec/stream`, { headers: { 'last-event-id': 'x0-1' } });
await fails('too_large', 'POST', `${at}/exec`, { body: { command: 'x'.repeat(2 << 20) } });
await fails('timeout', 'POST', `${at}/exec`, exec('sleep 1000', 0.5));
await fails('port_not_open', 'GET', `${at}/proxy/4000/`);

// Files: what is not there, what is no file, what leads out of the directory but not out of the guest.
await fails('file_not_found', 'GET', `${at}/files/download?path=/no/such`);
await call('POST', `${at}/exec`, exec('mkfifo /tmp/fifo; ln -s /etc/hostname /tmp/link; ln -s /tmp/loop /tmp/loop'));
for (const path of ['/tmp', '/tmp/fifo', '/dev/zero', '/tmp/loop', '/proc/self/root/tmp/fifo']) {
  await fails('bad_file', 'GET', `${at}/files/download?path=${path}`);
}
for (const path of ['', '%00', `/${'x'.repeat(5000)}`]) await fails('bad_input', 'GET', `${at}/files/download?path=${path}`);
await fails('bad_file', 'POST', `${at}/files/upload?path=/tmp/fifo`, { raw: 'x' });
await fails('bad_file', 'GET', `${at}/files?path=/etc/passwd`);
assert.match((await call('GET', `${at}/files/download?path=/tmp/../../../../etc/os-release`)).value, /Debian/);
const fill = "import os; s = os.statvfs('/tmp'); os.posix_fallocate(os.open('/tmp/fill', os.O_CREAT | os.O_RDWR), 0, s.f_bavail * s.f_bsize - 65536)";
assert.equal((await call('POST', `${at}/exec`, exec(`python3 -c "${fill}"`, 240))).value.exit_code, 0);
await fails('no_space', 'POST', `${at}/files/upload?path=/tmp/big`, { raw: new Uint8Array(1 << 20) });
assert.equal((await call('POST', `${at}/exec`, exec('rm /tmp/big /tmp/fill; echo alive'))).value.stdout, 'alive\n');

const headers = { 'idempotency-key': 'fork-once' };
const forks = [await call('POST', `${at}/fork`, { headers }), await call('POST', `${at}/fork`, { headers })];
assert.deepEqual(forks[0].value, forks[1].value);
await fails('idempotency_key_reused', 'POST', `${at}/fork`, { headers, body: { count: 2 } });
const child = `/v1/runs/${forks[0].value.forks[0].id}`;

// A snapshot whose state is cut short is refused before anything runs. (Its memory may be linked to a template.)
const snapshot = (await call('POST', `${child}/snapshot`)).value.snapshot_id;
truncateSync(`${state}/snapshots/${snapshot}/state`, 100);
await fails('snapshot_refused', 'POST', '/v1/runs/restore', { body: { snapshot_id: snapshot } });
await call('POST', `${child}/hibernate`);
await fails('wrong_state', 'POST', `${child}/exec`, exec('true'));
assert.equal((await call('POST', `${child}/resume`)).status, 200);

// Three may run.
const third = (await call('POST', '/v1/runs', { body: { timeout: 0 } })).value;
await fails('capacity', 'POST', '/v1/runs', { body: {} });
await fails('capacity', 'POST', `${at}/fork`, {});
await call('DELETE', `/v1/runs/${third.id}`);

// Twelve at a time resume once; destroy and fork race: one of them wins, and nothing is left over.
await call('POST', `${child}/hibernate`);
const resumed = await Promise.all(Array.from({ length: 12 }, () => call('POST', `${child}/resume`)));
assert.deepEqual(resumed.map((r) => r.status), Array(12).fill(200));
const race = await Promise.all([call('POST', `${child}/fork`), call('DELETE', child), call('POST', `${child}/exec`, exec('true')), call('POST', `${child}/hibernate`)]);
assert.equal(race[1].status, 200);
assert.ok(race.every((r) => [200, 201, 404, 409].includes(r.status)), JSON.stringify(race.map((r) => r.value)));
for (const run of (await call('GET', '/v1/runs')).value.runs) if (run.id !== sandbox.id) await call('DELETE', `/v1/runs/${run.id}`);

// One of them stands still: nothing is known of what it was asked.
const all = () => readdirSync('/proc').filter((pid) => /^\d+$/.test(pid)).filter((pid) => {
  const read = (file) => readFileSync(`/proc/${pid}/${file}`, 'latin1');
  try { return read('comm') === 'worker\n' && read('cmdline').split('\0').includes(state); } catch { return false; }
});
const still = all();
still.forEach((pid) => process.kill(Number(pid), 'SIGSTOP'));
await fails('sandbox_stuck', 'POST', `${at}/fork`);
still.forEach((pid) => process.kill(Number(pid), 'SIGCONT'));

// Killed workers' sandboxes are lost, and say so.
const workers = all();
assert.ok(workers.length > 0);
workers.forEach((pid) => process.kill(Number(pid), 'SIGKILL'));
const lost = async (path) => {
  for (let i = 0; (await call('GET', path)).value.status !== 'lost'; i++) {
    assert.ok(i < 600);
    await new Promise((wake) => setTimeout(wake, 50));
  }
};
await lost(at);
await fails('sandbox_lost', 'POST', `${at}/exec`, exec('true'));
assert.equal((await call('DELETE', at)).value.status, 'destroyed');
await fails('sandbox_not_found', 'GET', at);

// A guest that ends itself: why is said.
const ending = `/v1/runs/${(await call('POST', '/v1/runs', { body: { timeout: 0 } })).value.id}`;
await fails('sandbox_lost', 'POST', `${ending}/exec`, exec('python3 -c "import ctypes; ctypes.CDLL(None).reboot(0x1234567)"'));
await lost(ending);
assert.match((await call('POST', `${ending}/exec`, exec('true'))).value.error, /the guest reset itself/);
assert.equal((await call('DELETE', ending)).value.status, 'destroyed');

// A log that cannot be written: nothing is done.
const blocked = mint('blocked');
writeFileSync(`${state}/audit/blocked`, '');
await fails('audit_unavailable', 'POST', '/v1/runs', { as: blocked });
assert.deepEqual((await call('GET', '/v1/runs', { as: blocked })).value, { runs: [] });

const answers = await Promise.all(Array.from({ length: 700 }, () => call('GET', '/v1/usage', { as: other })));
assert.ok(answers.some((a) => a.status === 200));
const limited = answers.find((a) => a.status === 429);
assert.equal(limited.value.code, 'rate_limited');
assert.ok(Number(limited.headers.get('retry-after')) >= 1);
seen.set('rate_limited', limited.status);

// The list of revoked keys becomes unreadable: nobody is let in. Last, a registry that has lost a table.
copyFileSync(`${state}/keys/revoked`, `${state}/revoked.saved`);
rmSync(`${state}/keys/revoked`);
mkdirSync(`${state}/keys/revoked`);
await fails('unavailable', 'GET', '/v1/runs');
rmSync(`${state}/keys/revoked`, { recursive: true });
copyFileSync(`${state}/revoked.saved`, `${state}/keys/revoked`);
await fails('unauthorized', 'GET', '/v1/runs', { as: revoked });
const database = new DatabaseSync(`${state}/registry.db`);
database.exec('DROP TABLE snapshot');
database.close();
await fails('internal', 'GET', '/v1/snapshots');

const named = new Map(document['x-errors'].map(({ code, status }) => [code, status]));
assert.deepEqual(new Map([...seen].sort()), new Map([...named].sort()), 'every error of the document was provoked');
console.log(`${named.size} errors provoked`);

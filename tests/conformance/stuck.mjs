// A microVM's process that stands still: what is asked of its sandbox ends with an error, others answer meanwhile,
// it works again when it comes back, and it can be destroyed in any case.
import assert from 'node:assert/strict';
import { readFileSync, readdirSync, existsSync } from 'node:fs';

const { ISORUN_API_URL: base, ISORUN_API_KEY: key, PEREGRINE_STATE: state, DAEMON_PID: daemon } = process.env;
const authorization = `Bearer ${key}`;
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));
const call = async (method, path, body) => {
  const raw = typeof body === 'string';
  const response = await fetch(base + path, { method, headers: { authorization }, body: raw || body === undefined ? body : JSON.stringify(body) });
  const text = await response.text();
  let value = text;
  try { value = JSON.parse(text); } catch { /* not JSON */ }
  return { status: response.status, value };
};
const until = async (what, holds) => {
  for (let turns = 0; !(await holds()); turns++) {
    assert.ok(turns < 1200, `never: ${what}`);
    await sleep(100);
  }
};
const create = async () => {
  const { status, value } = await call('POST', '/v1/runs', { timeout: 0 });
  assert.equal(status, 201, JSON.stringify(value));
  return `/v1/runs/${value.id}`;
};
const works = async (at) => {
  const { status, value } = await call('POST', `${at}/exec`, { command: 'echo well', timeout: 240 });
  assert.deepEqual([status, value.stdout], [200, 'well\n'], JSON.stringify(value));
};
// Field 2 behind the name is the parent; 12 and 13 are ticks of CPU time (proc_pid_stat(5)).
const stat = (pid) => { try { return readFileSync(`/proc/${pid}/stat`, 'latin1').split(') ')[1].split(' '); } catch { return []; } };
const processes = () => readdirSync('/proc').filter((name) => /^\d+$/.test(name));
const children = (of) => processes().filter((pid) => stat(pid)[1] === of && stat(pid)[0] !== 'Z');
const descendants = (of) => children(of).flatMap((pid) => [pid, ...descendants(pid)]);
const ticks = (pid) => Number(stat(pid)[11] ?? 0) + Number(stat(pid)[12] ?? 0);
const files = () => readdirSync(`/proc/${daemon}/fd`).length;

// Which process is a sandbox's? The one that works while it computes; the stream of that is left open.
const busy = async (at) => {
  const stream = fetch(`${base}${at}/exec/stream`, {
    method: 'POST', headers: { authorization }, body: JSON.stringify({ command: 'while :; do :; done', timeout: 3600 }),
  }).then((response) => response.text());
  let found;
  await until('a busy process', async () => {
    const before = new Map(descendants(daemon).map((pid) => [pid, ticks(pid)]));
    await sleep(1000);
    found = [...before].map(([pid, then]) => [ticks(pid) - then, Number(pid)]).sort((a, b) => b[0] - a[0]);
    return found[0]?.[0] > 50 && !(found[1]?.[0] > 25);
  });
  return [found[0][1], stream];
};

const canary = await create();
await works(canary);
await until('a quiet start', async () => { const was = files(); await sleep(1500); return was === files(); });
const before = { files: files(), processes: descendants(daemon).length };

// Everything that can be asked, while its process stands still.
const victim = await create();
await works(victim);
const [pid, stream] = await busy(victim);
process.kill(pid, 'SIGSTOP');
const socket = (path) => new Promise((resolve) => {
  const said = [];
  const opened = new WebSocket(`${base.replace('http', 'ws')}${victim}/${path}?token=${key}`);
  opened.onmessage = ({ data }) => said.push(data);
  opened.onclose = () => resolve(said.join(' '));
});
const verbs = [
  ['exec', 'POST', { command: 'echo never', timeout: 3600 }], ['files?path=/', 'GET'], ['files/download?path=/etc/os-release', 'GET'],
  ['files/upload?path=/tmp/x', 'POST', 'x'.repeat(4 << 20)], ['snapshot', 'POST'], ['fork', 'POST', { count: 2 }], ['hibernate', 'POST'],
  ['proxy/80/', 'GET'],
];
const asked = verbs.map(async ([verb, method, body]) => ({ verb, ...(await call(method, `${victim}/${verb}`, body)) }));
const sockets = ['shell', 'terminal'].map(socket);
// The others do not notice.
for (let turns = 0; turns < 3; turns++) await works(canary);
for (const { verb, status, value } of await Promise.all(asked)) {
  assert.deepEqual([status, value.code], [504, 'sandbox_stuck'], `${verb}: ${JSON.stringify(value)}`);
}
assert.match(await stream, /sandbox_stuck/);
for (const said of await Promise.all(sockets)) assert.match(said, /stuck/);
assert.equal((await call('GET', victim)).value.status, 'running');

// It comes back: late answers are nobody's, and it is as it was.
process.kill(pid, 'SIGCONT');
await works(victim);
const earlier = new Set(children(String(pid)));
const { status, value } = await call('POST', `${victim}/fork`);
assert.equal(status, 201, JSON.stringify(value));
await works(`/v1/runs/${value.forks[0].id}`);

// A forked child is nobody's child process here, and ends all the same. So does its parent.
const [child] = children(String(pid)).filter((one) => !earlier.has(one)).map(Number);
for (const [at, process_] of [[`/v1/runs/${value.forks[0].id}`, child], [victim, pid]]) {
  process.kill(process_, 'SIGSTOP');
  assert.equal((await call('DELETE', at)).value.status, 'destroyed');
  await until(`the end of ${process_}, one of ${pid} and ${child}`, () => !existsSync(`/proc/${process_}`) || stat(process_)[0] === 'Z');
  assert.equal((await call('GET', at)).status, 404);
}
await works(canary);
for (const place of ['snapshots', 'hibernated']) {
  assert.deepEqual(existsSync(`${state}/${place}`) ? readdirSync(`${state}/${place}`).filter((name) => !name.startsWith('.')) : [], [], place);
}
await until('as many files as before', async () => files() <= before.files + 8);
await call('DELETE', canary);
console.log(`${verbs.length + 3} verbs ended`);

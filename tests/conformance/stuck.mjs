// A microVM's process that stands still: what is asked of its sandbox ends with an error and is not done later, others
// answer meanwhile, it works again when it comes back, and it can be destroyed in any case. No process is left over.
// Usage: stuck.mjs all | late | pooled | leave | adopted RUN PID
import assert from 'node:assert/strict';
import { readFileSync, readdirSync, existsSync } from 'node:fs';

const { ISORUN_API_URL: base, ISORUN_API_KEY: key, PEREGRINE_STATE: state, DAEMON_PID: daemon } = process.env;
const [step, ...given] = process.argv.slice(2);
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
const until = async (what, holds, now = () => '') => {
  for (let turns = 0; !(await holds()); turns++) {
    assert.ok(turns < 1200, `never: ${what}; ${now()}`);
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
const runs = async () => (await call('GET', '/v1/runs')).value.runs.map((run) => `/v1/runs/${run.id}`);

const read = (pid, file) => { try { return readFileSync(`/proc/${pid}/${file}`, 'latin1'); } catch { return ''; } };
// Field 2 behind the name is the parent; 12 and 13 are ticks of CPU time (proc_pid_stat(5)).
const stat = (pid) => read(pid, 'stat').split(') ')[1]?.split(' ') ?? [];
const lives = (pid) => ![undefined, 'Z', 'X'].includes(stat(pid)[0]);
// All workers of this daemon and of the one before, whoever their parents are.
const processes = (name) => readdirSync('/proc').filter((pid) => /^\d+$/.test(pid) && lives(pid)
  && read(pid, 'comm') === `${name}\n` && read(pid, 'cmdline').split('\0').includes(state));
const workers = () => processes('worker');
const children = (of) => workers().filter((pid) => stat(pid)[1] === String(of));
const described = () => workers().map((pid) => `${pid}: child of ${stat(pid)[1]}, ${stat(pid)[0]} in ${read(pid, 'wchan')}`).join('; ');
const ticks = (pid) => Number(stat(pid)[11] ?? 0) + Number(stat(pid)[12] ?? 0);
const files = () => readdirSync(`/proc/${daemon}/fd`).length;
// One worker a sandbox that runs, and the one that the pool keeps.
const nobody_else = async () => {
  const wanted = (await runs()).length + 1;
  await until(`${wanted} workers`, () => workers().length === wanted, described);
};
const ended = (pid) => until(`the end of ${pid}`, () => !lives(pid), described);

// Which process is a sandbox's? The one that works while it computes; the stream of that is left open.
const busy = async (at) => {
  const stream = fetch(`${base}${at}/exec/stream`, {
    method: 'POST', headers: { authorization }, body: JSON.stringify({ command: 'while :; do :; done', timeout: 3600 }),
  }).then((response) => response.text());
  let found;
  await until('a busy process', async () => {
    const before = new Map(workers().map((pid) => [pid, ticks(pid)]));
    await sleep(1000);
    found = [...before].map(([pid, then]) => [ticks(pid) - then, Number(pid)]).sort((a, b) => b[0] - a[0]);
    return found[0]?.[0] > 50 && !(found[1]?.[0] > 25);
  });
  return [found[0][1], stream];
};

// Everything that can be asked, while its process stands still.
const all = async () => {
  const canary = await create();
  await works(canary);
  await nobody_else();
  await until('a quiet start', async () => { const was = files(); await sleep(1500); return was === files(); });
  const files_before = files();

  const victim = await create();
  await works(victim);
  // Bodies that are not at their end: a file of holes, and an answer of which the first byte comes.
  const server = ['import socket', 's = socket.create_server(("127.0.0.1", 80))', 'c = s.accept()[0]', 'c.recv(9999)',
    'c.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 9999\\r\\n\\r\\nx")', 's.accept()'].join('\n');
  const served = `truncate -s 100G /tmp/holes; printf %s '${server}' > /tmp/server; python3 /tmp/server >/dev/null 2>&1 &`;
  assert.equal((await call('POST', `${victim}/exec`, { command: served, timeout: 240 })).value.exit_code, 0);
  const begun = async (path) => {
    let response;
    await until(path, async () => {
      response = await fetch(`${base}${victim}/${path}`, { headers: { authorization } });
      if (response.status !== 200) await response.text();
      return response.status === 200;
    });
    const reader = response.body.getReader();
    assert.ok((await reader.read()).value.length > 0);
    return reader;
  };
  const bodies = [await begun('files/download?path=/tmp/holes'), await begun('proxy/80/')];
  const [pid, stream] = await busy(victim);
  process.kill(pid, 'SIGSTOP');
  const rest = async (body) => { while (!(await body.read()).done); };
  const ends = bodies.map((body) => rest(body).then(() => 'well', (error) => error.message));
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
  const too_late = new Promise((wake) => setTimeout(wake, 120_000).unref());
  const cut = await Promise.race([Promise.all(ends), too_late]);
  assert.deepEqual(cut, ['terminated', 'terminated']);
  for (const said of await Promise.all(sockets)) assert.match(said, /stuck/);
  assert.equal((await call('GET', victim)).value.status, 'running');

  // It comes back: late answers are nobody's, what was given up is not done, and it is as it was.
  process.kill(pid, 'SIGCONT');
  await works(victim);
  await nobody_else();
  assert.deepEqual([...(await runs())].sort(), [canary, victim].sort());
  const { status, value } = await call('POST', `${victim}/fork`);
  assert.equal(status, 201, JSON.stringify(value));
  const fork = `/v1/runs/${value.forks[0].id}`;
  await works(fork);

  // A forked child is nobody's child process here, and ends all the same. So does its parent.
  const [child, ...others] = children(pid).map(Number);
  assert.deepEqual(others, [], described());
  for (const [at, process_] of [[fork, child], [victim, pid]]) {
    process.kill(process_, 'SIGSTOP');
    assert.equal((await call('DELETE', at)).value.status, 'destroyed');
    await ended(process_);
    assert.equal((await call('GET', at)).status, 404);
  }
  await works(canary);
  await until('as many files as before', async () => files() <= files_before + 8);
  await call('DELETE', canary);
  console.log(`${verbs.length + 4} verbs ended`);
};

// It comes back just when the first one was given up: what was answered with an error is not there, the rest is.
const late = async () => {
  const victim = await create();
  await works(victim);
  const [pid] = await busy(victim);
  let made = 0;
  for (let turns = 0; turns < 5; turns++) {
    process.kill(pid, 'SIGSTOP');
    const asked = Array.from({ length: 6 }, () => call('POST', `${victim}/fork`));
    await Promise.race(asked);
    process.kill(pid, 'SIGCONT');
    for (const { status, value } of await Promise.all(asked)) {
      assert.ok(status === 201 || value.code === 'sandbox_stuck', JSON.stringify(value));
      made += status === 201 ? value.forks.length : 0;
    }
    await works(victim);
  }
  // Whatever is still done, is done by then.
  await sleep(2000);
  const there = await runs();
  assert.equal(there.length, 1 + made);
  await nobody_else();
  for (const at of there) assert.equal((await call('DELETE', at)).status, 200);
  console.log(`${made} made`);
};

// One of the pool's: a create takes another, and is recorded once. If all are, it fails, and two entries are left of it.
const pooled = async () => {
  await nobody_else();
  const entries = () => readFileSync(`${state}/audit/dev/log.ndjson`, 'utf8').trim().split('\n').map(JSON.parse);
  const [waits] = workers();
  process.kill(waits, 'SIGSTOP');
  const at = await create();
  await ended(waits);
  await works(at);
  const of = entries().filter(({ sandbox_id }) => at.endsWith(sandbox_id)).map(({ event }) => event);
  assert.deepEqual(of, ['sandbox.created', 'exec.start', 'exec.exit']);
  assert.equal((await call('DELETE', at)).status, 200);
  await nobody_else();
  const [begin, past] = [entries().length, (await call('GET', '/v1/runs/history')).value];
  // Nor is another one made.
  const stopped = [...workers(), ...processes('zygote')];
  assert.equal(stopped.length, 2, described());
  stopped.forEach((pid) => process.kill(pid, 'SIGSTOP'));
  const { status, value } = await call('POST', '/v1/runs', { timeout: 0 });
  process.kill(stopped[1], 'SIGCONT');
  assert.ok([503, 504].includes(status), `${status}: ${JSON.stringify(value)}`);
  assert.deepEqual(await runs(), []);
  assert.deepEqual((await call('GET', '/v1/runs/history')).value, past);
  const [made, unmade, ...others] = entries().slice(begin);
  assert.deepEqual([made?.event, unmade?.event, others], ['sandbox.created', 'sandbox.destroyed', []]);
  assert.equal(made.sandbox_id, unmade.sandbox_id);
  assert.ok(unmade.data.why, JSON.stringify(unmade));
  console.log(unmade.data.why);
};

// Its daemon is killed now, and the next one has it.
const adopted = async (at, pid) => {
  await works(at);
  process.kill(pid, 'SIGSTOP');
  const { status, value } = await call('POST', `${at}/exec`, { command: 'true', timeout: 3600 });
  assert.deepEqual([status, value.code], [504, 'sandbox_stuck'], JSON.stringify(value));
  process.kill(pid, 'SIGCONT');
  await works(at);
  process.kill(pid, 'SIGSTOP');
  assert.equal((await call('DELETE', at)).value.status, 'destroyed');
  await ended(pid);
};

if (step === 'leave') {
  const at = await create();
  console.log(`${at} ${(await busy(at))[0]}`);
  // What it computes goes on.
  process.exit(0);
} else {
  await { all, late, pooled, adopted: () => adopted(given[0], Number(given[1])) }[step]();
  await nobody_else();
  const left = (dir) => (existsSync(`${state}/${dir}`) ? readdirSync(`${state}/${dir}`).filter((name) => !name.startsWith('.')) : []);
  for (const dir of ['snapshots', 'hibernated']) assert.deepEqual(left(dir), [], dir);
  // A worker that waits in the pool has its place for the next daemon already; nobody else has one.
  await until('a place for each worker', () => left('workers').length === workers().length, () => left('workers').join('; '));
}

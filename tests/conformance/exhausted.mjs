// The host has no more descriptors, processes or threads to give, or interrupts calls: the API says so, what runs
// goes on, and all is well again when the host is. Usage: exhausted.mjs canary | files | threads ID | well ID [COUNT]
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { Agent, request } from 'node:http';

const { ISORUN_API_URL: base, ISORUN_API_KEY: key, DAEMON_PID: daemon } = process.env;
const [step, id, count = '1'] = process.argv.slice(2);
// One connection, kept: a new one would need a descriptor.
const agent = new Agent({ keepAlive: true, maxSockets: 1 });
const call = (method, path, body) => new Promise((resolve, reject) => {
  const asked = request(base + path, { method, agent, headers: { authorization: `Bearer ${key}` } }, (response) => {
    let text = '';
    response.setEncoding('utf8').on('data', (part) => (text += part)).on('end', () =>
      resolve({ status: response.statusCode, headers: response.headers, value: JSON.parse(text) }));
  });
  asked.on('error', reject).end(body && JSON.stringify(body));
});
const create = () => call('POST', '/v1/runs', { timeout: 0 });
const works = async (sandbox) => {
  const { status, value } = await call('POST', `/v1/runs/${sandbox}/exec`, { command: 'echo well', timeout: 240 });
  assert.deepEqual([status, value.stdout], [200, 'well\n'], JSON.stringify(value));
};
// What stood ready is handed out; then there is no more, and that is said.
const until_refused = async (words) => {
  const made = [];
  for (let turns = 0; turns < 60; turns++) {
    const { status, value, headers } = await create();
    if (status !== 201) {
      assert.deepEqual([status, value.code], [503, 'unavailable'], JSON.stringify(value));
      assert.match(value.error, words);
      assert.ok(Number(headers['retry-after']) >= 1);
      return made;
    }
    made.push(value.id);
  }
  throw new Error('never refused');
};
const destroy = async (ids) => { for (const one of ids) assert.equal((await call('DELETE', `/v1/runs/${one}`)).status, 200); };
const until_made = async () => {
  for (let turns = 0; turns < 120; turns++) {
    const { status, value, headers } = await create();
    if (status === 201) return value.id;
    assert.equal(status, 503, JSON.stringify(value));
    await new Promise((wake) => setTimeout(wake, 1000 * Number(headers['retry-after'])));
  }
  throw new Error('never well again');
};

if (step === 'canary') {
  console.log((await create()).value.id);
} else if (step === 'files') {
  await works(id);
  const open = new Set(readdirSync(`/proc/${daemon}/fd`).map(Number));
  let free = 0;
  while (open.has(free)) free++;
  const limit = readFileSync(`/proc/${daemon}/limits`, 'utf8').match(/open files\s+(\d+)/)[1];
  execFileSync('prlimit', ['--pid', daemon, `--nofile=${free}:`]);
  const made = await until_refused(/open files/);
  await works(id);
  await destroy(made.slice(1));
  execFileSync('prlimit', ['--pid', daemon, `--nofile=${limit}:`]);
  await destroy(made.slice(0, 1));
} else if (step === 'threads') {
  const made = await until_refused(/temporarily unavailable/);
  await works(id);
  await destroy(made);
}
if (step !== 'canary') {
  if (step !== 'threads') {
    const made = [];
    while (made.length < Number(count)) {
      made.push(await until_made());
      await works(made.at(-1));
    }
    const { status, value } = await call('POST', `/v1/runs/${made[0]}/fork`, { count: 2 });
    assert.equal(status, 201, JSON.stringify(value));
    for (const fork of value.forks) await works(fork.id);
    await destroy([...made, ...value.forks.map((fork) => fork.id)]);
  }
  await works(id);
}
agent.destroy();

// One verb, and the daemon is killed so many milliseconds into it (`kill VERB MS`); then, with the next daemon, `check`: what was
// acknowledged holds, what was not is the old state or the new one, and the same request again completes it.
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { readFile, writeFile } from 'node:fs/promises';
import { Isorun } from 'isorun';

const client = new Isorun();
const base = process.env.ISORUN_API_URL;
const notes = `${process.env.PEREGRINE_STATE}/../kill.json`;
const [, , phase, verb, ms] = process.argv;
const CHILDREN = 3;

const call = async (method, path, body, key) => {
  const response = await fetch(base + path, {
    method,
    headers: { authorization: `Bearer ${process.env.ISORUN_API_KEY}`, ...(key && { 'idempotency-key': key }) },
    body: body && JSON.stringify(body),
  });
  const answer = JSON.parse(await response.text());
  assert.ok(response.ok, `${method} ${path}: ${response.status} ${JSON.stringify(answer)}`);
  return answer;
};
const requests = {
  create: () => ['POST', '/v1/runs', { timeout: 0 }],
  fork: (id) => ['POST', `/v1/runs/${id}/fork`, { count: CHILDREN }],
  hibernate: (id) => ['POST', `/v1/runs/${id}/hibernate`],
  resume: (id) => ['POST', `/v1/runs/${id}/resume`],
  snapshot: (id) => ['POST', `/v1/runs/${id}/snapshot`],
  destroy: (id) => ['DELETE', `/v1/runs/${id}`],
};
const ids = async () => (await client.list()).map((sandbox) => sandbox.id).sort();
const snapshots = async () => (await client.listSnapshots()).map((snapshot) => snapshot.id).sort();
const word = async (id) => (await client.get(id)).readFile('/tmp/word');

if (phase === 'kill') {
  const sandbox = await client.create({ timeoutSec: 0 });
  await sandbox.writeFile('/tmp/word', sandbox.id);
  if (verb === 'resume') await sandbox.hibernate();
  const before = { id: sandbox.id, ids: await ids(), snapshots: await snapshots(), key: randomUUID() };
  const asked = call(...requests[verb](sandbox.id), verb === 'create' || verb === 'fork' ? before.key : undefined);
  const answer = asked.then((answer) => answer, () => null);
  await new Promise((resolve) => setTimeout(resolve, Number(ms)));
  process.kill(Number(process.env.DAEMON_PID), 'SIGKILL');
  await writeFile(notes, JSON.stringify({ ...before, verb, answer: await answer }));
} else {
  const { id, ids: old, snapshots: kept, key, verb, answer } = JSON.parse(await readFile(notes));
  const now = await ids();
  console.log(`${verb}: ${answer ? 'acknowledged' : 'not acknowledged'}, ${now.length - old.length} more sandboxes`);
  const made = now.filter((one) => !old.includes(one));
  if (verb === 'create' || verb === 'fork') {
    const all = verb === 'create' ? 1 : CHILDREN;
    assert.ok(made.length === all || (made.length === 0 && !answer), `${made.length} of ${all}`);
    const again = await call(...requests[verb](id), key);
    const told = (verb === 'create' ? [again] : again.forks).map((run) => run.id).sort();
    if (made.length) assert.deepEqual(told, made, 'asked again, nothing is made twice');
    assert.equal((await ids()).length, old.length + all);
    if (verb === 'fork') for (const child of told) assert.equal(await word(child), id);
    for (const one of told) await (await client.get(one)).destroy();
  } else if (verb === 'destroy') {
    assert.deepEqual(now, answer || !now.includes(id) ? old.filter((one) => one !== id) : old);
    if (now.includes(id)) assert.equal(await word(id), id);
    assert.equal((await call(...requests.destroy(id))).status, 'destroyed');
  } else {
    assert.deepEqual(now, old);
    const { status } = await (await client.get(id)).info();
    const [before, after] = { hibernate: ['running', 'hibernated'], resume: ['hibernated', 'running'] }[verb] ?? ['running', 'running'];
    assert.ok(status === after || (status === before && !answer), `${status}, was ${before}`);
    if (verb !== 'snapshot') assert.equal((await call(...requests[verb](id))).status, after);
    if (verb === 'hibernate') await call(...requests.resume(id));
    assert.equal(await word(id), id);
  }
  const saved = (await snapshots()).filter((one) => !kept.includes(one));
  assert.ok(saved.length === (answer && verb === 'snapshot' ? 1 : 0) || (verb === 'snapshot' && saved.length === 1));
  for (const one of saved) {
    const restored = await client.restore(one);
    assert.equal(await restored.readFile('/tmp/word'), id);
    await restored.destroy();
    await client.deleteSnapshot(one);
  }
  if (verb !== 'destroy') await (await client.get(id)).destroy();
}
client.close();

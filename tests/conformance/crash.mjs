// Before and after a daemon's death: `before` prints what `after` is given.
import assert from 'node:assert/strict';
import { Isorun } from 'isorun';

const client = new Isorun();
const [, , phase, given] = process.argv;
if (phase === 'before') {
  const running = await client.create({ timeoutSec: 0 });
  await running.writeFile('/tmp/word', 'kept');
  const snapshot = await running.snapshot();
  const [asleep] = await running.fork(1);
  await asleep.hibernate();
  const { uptimeMs } = (await client.history())[0] ?? { uptimeMs: 0 };
  assert.equal(uptimeMs, 0);
  console.log(JSON.stringify({ running: running.id, snapshot: snapshot.id, asleep: asleep.id }));
} else {
  const { running, snapshot, asleep } = JSON.parse(given);
  const lost = await client.get(running);
  assert.equal((await lost.info()).status, 'lost');
  await assert.rejects(lost.exec('true'), (e) => e.status === 409);
  assert.deepEqual((await client.list()).map((s) => s.id), [asleep]);
  const again = await client.get(asleep);
  assert.equal((await again.info()).status, 'hibernated');
  await again.resume();
  assert.equal(await again.readFile('/tmp/word'), 'kept');
  assert.deepEqual((await client.listSnapshots()).map((s) => s.id), [snapshot]);
  const restored = await client.restore(snapshot);
  assert.equal(await restored.readFile('/tmp/word'), 'kept');
  for (const one of [again, restored, lost]) assert.equal((await one.destroy()).status, 'destroyed');
  assert.ok((await client.history()).every((entry) => entry.uptimeMs >= 0 && entry.costCents >= 0));
  assert.equal((await client.usage()).activeSandboxes, 0);
}
client.close();

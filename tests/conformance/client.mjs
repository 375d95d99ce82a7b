// Every method of the published client. Ends with a non-zero code at the first that does not do what it promises.
import { createServer } from 'node:http';
import assert from 'node:assert/strict';
import { Isorun, IsorunError } from 'isorun';

const step = async (name, action) => {
  const begun = performance.now();
  const value = await action();
  console.log(`${name}: ${(performance.now() - begun).toFixed(1)} ms`);
  return value;
};

const client = new Isorun();
assert.deepEqual(await client.list(), []);

const sandbox = await step('create', () => client.create({ timeoutSec: 120 }));
assert.match(sandbox.id, /^run[0-9a-f]{20}$/);
assert.equal(sandbox.image, 'node:22-slim');
assert.equal(sandbox.vcpus, 1);
assert.equal(sandbox.memMiB, 128);
assert.ok(sandbox.createMs > 0);

const ran = await step('exec', () => sandbox.exec('echo out; echo err >&2; exit 7', 240));
assert.deepEqual(ran, { exitCode: 7, stdout: 'out\n', stderr: 'err\n' });

const info = await step('info', () => sandbox.info());
assert.equal(info.status, 'running');
assert.ok(Date.parse(info.createdAt) > 1.7e12);
assert.deepEqual((await client.list()).map((s) => s.id), [sandbox.id]);
assert.equal((await client.get(sandbox.id)).id, sandbox.id);
assert.equal(await client.get('run00000000000000000000'), null);
await step('setTimeout', () => sandbox.setTimeout(600));

// Files: text, bytes, directories that are not there yet.
await step('writeFile', () => sandbox.writeFile('/tmp/deep/er/hello.txt', 'grüße\n'));
assert.equal(await step('readFile', () => sandbox.readFile('/tmp/deep/er/hello.txt')), 'grüße\n');
await sandbox.writeFile('/tmp/deep/bytes', new Uint8Array([0x61, 0x0a, 0x62]));
assert.deepEqual(await step('readdir', () => sandbox.readdir('/tmp/deep')), [{ name: 'bytes' }, { name: 'er' }]);
await assert.rejects(sandbox.readFile('/tmp/none'), (e) => e.status === 404);
await assert.rejects(sandbox.readFile('/tmp'), (e) => e.status === 400);
await assert.rejects(sandbox.readdir('/tmp/deep/bytes'), (e) => e.status === 400);

// Forks have what the parent had, and then each its own.
const forks = await step('fork', () => sandbox.fork(2));
assert.equal(forks.length, 2);
await forks[0].writeFile('/tmp/deep/bytes', 'mine');
assert.equal(await forks[1].readFile('/tmp/deep/bytes'), 'a\nb');
assert.equal(await sandbox.readFile('/tmp/deep/bytes'), 'a\nb');
await forks[0].destroy();

// Snapshots outlive what comes after them.
const snapshot = await step('snapshot', () => sandbox.snapshot());
assert.equal(snapshot.runId, sandbox.id);
assert.ok(snapshot.sizeBytes > 0 && Date.parse(snapshot.createdAt) > 1.7e12);
assert.deepEqual((await step('listSnapshots', () => client.listSnapshots())).map((s) => s.id), [snapshot.id]);
await sandbox.writeFile('/tmp/deep/bytes', 'later');
const restored = await step('restore', () => client.restore(snapshot.id));
assert.notEqual(restored.id, sandbox.id);
assert.equal(await restored.readFile('/tmp/deep/bytes'), 'a\nb');
await step('deleteSnapshot', () => client.deleteSnapshot(snapshot.id));
assert.deepEqual(await client.listSnapshots(), []);
await assert.rejects(client.restore(snapshot.id), (e) => e.status === 404);
await restored.destroy();

// Hibernation keeps the id and the files.
await step('hibernate', () => forks[1].hibernate());
assert.equal((await forks[1].info()).status, 'hibernated');
await assert.rejects(forks[1].exec('true'), (e) => e.status === 409);
await step('resume', () => forks[1].resume());
assert.equal((await forks[1].info()).status, 'running');
assert.equal(await forks[1].readFile('/tmp/deep/bytes'), 'a\nb');
assert.deepEqual(await forks[1].exec('hostname', 240), { exitCode: 0, stdout: `${forks[1].id}\n`, stderr: '' });
await forks[1].destroy();

const audit = await step('auditLog', () => sandbox.auditLog());
const events = audit.map((entry) => entry.event);
for (const event of ['sandbox.created', 'exec.start', 'exec.exit', 'file.written', 'file.read', 'file.listed', 'snapshot.created']) {
  assert.ok(events.includes(event), `${event} in ${events}`);
}
assert.ok(audit.every((e) => e.sandboxId === sandbox.id && e.hmac.startsWith('sha256:') && e.timestamp));
assert.ok(sandbox.url(3000, '/x').endsWith(`/v1/runs/${sandbox.id}/proxy/3000/x`));

const profiles = await step('networkProfiles', () => client.networkProfiles());
assert.ok(profiles.length > 0 && profiles.every((p) => p.name && Array.isArray(p.allow)));

const bill = await step('destroy', () => sandbox.destroy());
assert.equal(bill.status, 'destroyed');
assert.ok(bill.uptimeMs > 0 && bill.memPeakBytes > 0 && bill.costCents > 0);
assert.deepEqual(await client.list(), []);

const past = await step('history', () => client.history());
assert.equal(past[0].id, sandbox.id);
assert.equal(past[0].costCents, bill.costCents);
const usage = await step('usage', () => client.usage());
assert.equal(usage.activeSandboxes, 0);
assert.equal(usage.historySandboxes, past.length);
assert.ok(usage.totalCostCents >= bill.costCents);

const registry = createServer((_, response) => response.writeHead(404).end());
await new Promise((resolve) => registry.listen(0, '127.0.0.1', resolve));
await assert.rejects(client.create({ image: `127.0.0.1:${registry.address().port}/no/such:image` }), (error) =>
  error instanceof IsorunError && error.status === 404 && JSON.parse(error.body).code === 'image_not_found');
registry.close();
client.close();

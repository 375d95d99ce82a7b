// Every method of the published client. Ends with a non-zero code at the first that does not do what it promises.
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

const ran = await step('exec', () => sandbox.exec('echo out; echo err >&2; exit 7'));
assert.deepEqual(ran, { exitCode: 7, stdout: 'out\n', stderr: 'err\n' });

const info = await step('info', () => sandbox.info());
assert.equal(info.status, 'running');
assert.ok(Date.parse(info.createdAt) > 1.7e12);
assert.deepEqual((await client.list()).map((s) => s.id), [sandbox.id]);
assert.equal((await client.get(sandbox.id)).id, sandbox.id);
assert.equal(await client.get('run00000000000000000000'), null);
await step('setTimeout', () => sandbox.setTimeout(600));

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

await assert.rejects(client.create({ image: 'no/such:image' }), (error) =>
  error instanceof IsorunError && error.status === 404 && JSON.parse(error.body).code === 'image_not_found');
client.close();
